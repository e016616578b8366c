"""``lagless tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lagless.cli._commands import average_command
from lagless.cli._console import err, out
from lagless.cli._evaluation_options import BatchSize, Device, Length, Output, Seed, Sequences, check_output, require
from lagless.cli._rule_options import Grid, RuleNames, chosen_rules, rule_options, settings_of

if TYPE_CHECKING:
    from lagless.lab.tune import Trial, Tuned
    from lagless.rules import Rule


@rule_options
def tune_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with checkpoint-N folders.")],
    settings: dict[str, Any],
    validation: Annotated[str, typer.Option(help="File or hub data set that the search sees.")],
    test: Annotated[str, typer.Option(help="File or hub data set that it does not see.")],
    rule: RuleNames = ["bema", "ema"],  # noqa: B006
    grid: Grid = [],  # noqa: B006
    evaluations: Annotated[int, typer.Option(help="Averages to evaluate on validation at most.")] = 12,
    output: Output = None,
    sequences: Sequences = 200,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Find the best rule and setting for a run by gradients, and report it on data the search did not see."""
    require("tune")
    from lagless.checkpoints import find_checkpoints
    from lagless.lab.evaluate import load_tokenizer
    from lagless.lab.evaluation import held_out_sequences
    from lagless.lab.tune import tune, write_tuned

    check_output(output)
    trajectory = find_checkpoints(run)
    tokenizer = load_tokenizer(trajectory.checkpoints[-1].folder)
    seen, unseen = (
        held_out_sequences(source, tokenizer, length=length, count=sequences, seed=seed)
        for source in (validation, test)
    )

    def progress(trial: Trial) -> None:
        err.print(f"{trial.loss:.5f}  {_about(trial.rule)}", highlight=False, markup=False)

    starts = chosen_rules(trajectory.steps, rule, settings, grid)
    found = tune(
        trajectory,
        starts,
        seen,
        unseen,
        evaluations=evaluations,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    _print_tuned(found)
    if output is not None:
        write_tuned(output, found)
        out.print(f"written to {output}", highlight=False, markup=False)
    if (command := average_command(found.best, [run], trajectory.steps)) is not None:
        out.print("\nTo make the model:")
        out.print(command, highlight=False, markup=False)


def _about(rule: Rule | None) -> str:
    return "live" if rule is None else f"{type(rule).__name__} {settings_of(rule)}".strip()


def _print_tuned(found: Tuned) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("average", "validation", "test", "test minus live", "rule"):
        table.add_column(column, overflow="fold")
    for c in found.candidates:
        paired = "" if c.rule is None else f"{c.difference.value:+.4f} ± {c.difference.standard_error:.4f}"
        tested = f"{c.test.value:.4f} ± {c.test.standard_error:.4f}"
        table.add_row(c.name, f"{c.validation:.4f}", tested, paired, _about(c.rule))
    out.print(table, highlight=False)
    gain = found.best_minus_start
    out.print(
        f"{len(found.trials)} of {found.considered} settings were evaluated on validation; on test, the best is "
        f"{gain.value:+.4f} ± {gain.standard_error:.4f} from the best start",
        highlight=False,
    )
    if found.at_edge:
        values = ", ".join(f"{name}={getattr(found.best, name):g}" for name in found.at_edge)
        out.print(
            f"the best lies at an edge of what is searched, {values}: a better one may lie beyond. lagless evaluate "
            "RUN --rule ... --grid ... evaluates settings of your own",
            highlight=False,
        )
    if found.beyond:
        out.print(
            f"{found.beyond} settings were left out, further from the best than the model of the loss is believed. "
            "A --grid of starts that reaches further, or more --evaluations, bring them in",
            highlight=False,
        )
