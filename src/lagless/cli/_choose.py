"""``lagless choose``."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lagless.cli._average import At, Runs, Start, StartStep, Steps
from lagless.cli._commands import average_command
from lagless.cli._console import err, out
from lagless.cli._evaluation_options import BatchSize, Device, Length, Seed, Sequences, require
from lagless.cli._rule_options import integers

if TYPE_CHECKING:
    from lagless.lab.choose import Choice, Option
    from lagless.lab.statistics import Mean


def choose(
    run: Runs,
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Held-out file or hub data set; the shortlist is evaluated.")
    ] = None,
    start: Start = None,
    start_step: StartStep = None,
    steps: Steps = None,
    at: At = None,
    memory: Annotated[str, typer.Option(help="Most memory for buffers while files are read.")] = "1GiB",
    sequences: Sequences = 200,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Say which average of a run to make: predicted from its checkpoints, and with --data measured.

    The checkpoints are read once. How they move shows drift and noise, and from both follows the loss of every rule
    of a shortlist up to one unknown scale. With held-out text all of them are evaluated: one half of the sequences
    decides, the other says what was gained.
    """
    if data is not None:
        require("choose")
    elif importlib.util.find_spec("scipy") is None:
        raise ImportError("lagless choose needs scipy: pip install 'lagless[lab]'")
    from lagless.checkpoints import find_checkpoints, parse_size
    from lagless.cli._processes import reading
    from lagless.lab.choose import choose_rule
    from lagless.lab.evaluate import load_tokenizer
    from lagless.lab.evaluation import held_out_sequences

    source = run[0] if len(run) == 1 else run
    trajectory = find_checkpoints(source, integers("--steps", steps), start, start_step).until(at)
    held_out = None
    if data is not None:
        tokenizer = load_tokenizer(trajectory.checkpoints[-1].folder)
        held_out = held_out_sequences(data, tokenizer, length=length, count=sequences, seed=seed)
    with reading() as progress:
        choice = choose_rule(
            trajectory,
            held_out,
            batch_size=batch_size,
            device=device,
            memory=parse_size(memory),
            progress=progress,
            evaluated=lambda name: err.print(f"evaluated {name}", highlight=False, markup=False),
        )
    for line in conclusion(choice):
        _say(line)
    out.print()
    out.print(options_table(choice), highlight=False)
    for line in explanation(choice):
        out.print()
        _say(line)
    if choice.best is not None:
        given = {"start": start, "start_step": start_step, "steps": steps, "at": at}
        _say("\nTo make the model:")
        command = average_command(choice.best.rule, run, choice.steps, given)
        out.print(command, highlight=False, markup=False, soft_wrap=True)


def conclusion(choice: Choice) -> list[str]:
    """Return what to do, the most important first."""
    lines: list[str] = []
    best, rules = choice.best, len(choice.options)
    live = f"the weights of step {choice.steps[-1]:,} as they are"
    if choice.decayed:
        last = float(choice.rate.multipliers[-1])
        lines.append(
            f"The learning rate ended at {last:.2g} of its peak, which removes noise as averaging does: expect little "
            "from averaging here."
        )
    if best is None:
        why = {
            "measured": f"none of {rules} rules is below the live weights on held-out text.",
            "predicted": "being behind would cost more than the noise that averaging removes.",
        }[choice.basis]
        return [*lines, f"Averaging will not help here: {why} Take {live}."]
    if choice.basis == "measured":
        assert best.confirmed is not None
        lines.append(
            f"Take {best.name}: the lowest loss of {rules} rules and the live weights on half of the held-out "
            f"sequences; on the other half {_difference(best.confirmed)} nats per token against the live weights."
        )
        if abs(best.confirmed.value) < 2.0 * best.confirmed.standard_error:
            lines.append("That is within twice its standard error: the gain is not certain.")
    elif choice.basis == "predicted":
        lines.append(
            f"Take {best.name}: predicted best of {rules} rules from {len(choice.steps)} checkpoints. Not measured: "
            "with --data TEXT it is."
        )
    else:
        lines.append(f"Take {best.name}, which is rarely harmful; this run's checkpoints do not tell which is best.")
    return lines


def options_table(choice: Choice) -> Table:
    """Return the shortlist, best first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("rule", no_wrap=True)
    for heading in ("mean age", "iterates", *_headings(choice)):
        table.add_column(heading, justify="right", no_wrap=True)
    unit = _unit(choice)
    for option in choice.options:
        table.add_row(option.name, f"{option.age:,.0f}", f"{option.iterates:.1f}", *_numbers(option, choice, unit))
    return table


def explanation(choice: Choice) -> list[str]:
    """Return what the numbers mean, what the run did, and what is not known."""
    lines: list[str] = []
    if choice.basis == "predicted":
        lines.append(
            "Predicted loss against the live weights, in units of the largest number: what averaging the noise saves "
            "(negative), and what being behind the drift costs. One evaluation gives the unit."
        )
    elif choice.basis == "measured":
        scale = "" if choice.scaled_by is None else f" Predictions are scaled by what {choice.scaled_by} measured."
        lines.append(
            "Loss against the live weights in nats per token, ± standard error over sequences; the choice is by the "
            f"column 'deciding half'.{scale}"
        )
    path = choice.path
    lines.append(
        f"The run went {path.length:.3g} far from θ_{choice.steps[0]}, at {path.early:.2f} of its mean pace in the "
        f"first half of the steps and {path.late:.2f} in the last quarter, and up to {path.aside.max():.0%} of the way "
        "aside of the straight line."
    )
    if choice.basis != "default":
        lines.append(
            f"The prediction is that of gradient descent on a quadratic, which misses {choice.motion.misfit:.0%} of "
            f"the motion, with drift counted {choice.drift_weight:g} times, as runs of AdamW had it. How drift weighs "
            "against noise on this run only an evaluation tells."
        )
    return [*lines, *choice.doubts]


def _headings(choice: Choice) -> tuple[str, ...]:
    if choice.basis == "measured":
        return (*(("predicted",) if choice.scale is not None else ()), "deciding half", "other half")
    return ("noise", "drift", "predicted") if choice.basis == "predicted" else ()


def _unit(choice: Choice) -> float:
    if choice.scale is not None:
        return 1.0 / choice.scale
    return max((max(abs(option.noise), abs(option.drift)) for option in choice.options), default=0.0) or 1.0


def _numbers(option: Option, choice: Choice, unit: float) -> list[str]:
    if choice.basis == "measured":
        assert option.measured is not None and option.confirmed is not None
        predicted = [f"{option.predicted / unit:+.4f}"] if choice.scale is not None else []
        return [*predicted, _difference(option.measured), _difference(option.confirmed)]
    if choice.basis == "predicted":
        return [f"{value / unit:+.3f}" for value in (option.noise, option.drift, option.predicted)]
    return []


def _difference(value: Mean) -> str:
    return f"{value.value:+.4f} ± {value.standard_error:.4f}"


def _say(line: str) -> None:
    out.print(line, highlight=False, markup=False, soft_wrap=False)
