"""What was seen, in sentences made from the numbers, and how to do the same in a training of one's own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lagless.lab.demo._results import DemoResult, Difference, Row, settings
from lagless.rules import EMA, Rule


def findings(result: DemoResult) -> list[str]:
    """What the numbers carry, and nothing else; "clearly" is more than two standard errors."""
    rule = result.rows[0].candidate.rule
    matched = f"At the same settings (κ={vars(rule)['ema_power']:g}, φ={rule.update_freq})"
    best = "Each at its best setting"
    losses = [row.loss for row in result.best_rows]
    return [
        f"{matched} the loss, minus that of the live weights, is {_verdicts(result.matched_rows)}.",
        _compared(result.matched, "BEMA", "EMA", matched),
        f"{best} it is {_verdicts(result.best_rows)}. From the lowest to the highest of these there are "
        f"{max(losses) - min(losses):.3f} nats.",
        _compared(result.best, "BEMA", "EMA", best),
        _conclusion(result),
    ]


def caveats(result: DemoResult) -> list[str]:
    """What the numbers do not say."""
    families = [type(row.candidate.rule).__name__ for row in result.matched_rows]
    counts = [sum(type(c.rule).__name__ == family for c in result.candidates) for family in families]
    tried = _listed([f"{count} settings of {family}" for family, count in zip(families, counts, strict=True)])
    return [
        f"This is one run with one seed ({result.plan.seed}). The standard errors say how much a difference would move "
        f"with other held-out files ({result.files} of them here); other seeds, data or models can move it more. "
        "Try --seed 1.",
        f"The best settings were chosen on validation text and measured on test text from other files, among {tried}: "
        "more settings are more chances.",
        "The model starts from random weights, learns with a constant learning rate to the end and is stopped long "
        "before it has converged. Weights from long ago are much worse than recent ones then, which punishes old "
        "averages. Fine-tuning was not tried here, and neither was a learning rate that falls to zero, which removes "
        "much of the same noise by itself.",
    ]


def _verdicts(rows: Sequence[Row]) -> str:
    groups = {
        "clearly lower": [row for row in rows if row.difference.clear and row.difference.mean < 0],
        "not clearly different": [row for row in rows if not row.difference.clear],
        "clearly higher": [row for row in rows if row.difference.clear and row.difference.mean > 0],
    }
    shown = {
        verdict: [f"{row.label.removeprefix('best ')} ({row.difference})" for row in those]
        for verdict, those in groups.items()
    }
    return "; ".join(f"{verdict} for {_listed(those)}" for verdict, those in shown.items() if those)


def _conclusion(result: DemoResult) -> str:
    winner = result.winner
    name = f"{winner.label.removeprefix('best ')} with {settings(winner.candidate.rule)}"
    if winner.difference.clear and winner.difference.mean < 0:
        return (
            f"So averaging was worth having here: the best on validation text, {name}, takes the test loss from "
            f"{result.live_loss:.3f} to {winner.loss:.3f}, for no further step of training."
        )
    return (
        f"So averaging was not worth having here: even the best on validation text, {name}, is {winner.difference} "
        "from the live weights on test text."
    )


def _compared(difference: Difference, one: str, other: str, when: str) -> str:
    if not difference.clear:
        return f"{when}, {one} and {other} cannot be told apart: {one} minus {other} is {difference}."
    verdict = "beats" if difference.mean < 0 else "loses to"
    return f"{when}, {one} {verdict} {other}: {one} minus {other} is {difference}."


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def arguments(rule: Rule) -> dict[str, float | int]:
    """The hyperparameters that matter for a rule of the demo, in the order to write them."""
    if isinstance(rule, EMA) and rule.half_life is not None:
        names = ["half_life"]
    else:
        names = ["ema_power", *(["bias_power"] if hasattr(rule, "bias_power") else [])]
    return {name: getattr(rule, name) for name in [*names, "update_freq", "update_after"]}


def python_code(row: Row) -> str:
    """Lines to follow that rule in any training loop."""
    rule = row.candidate.rule
    values = ", ".join(f"{name}={value:g}" for name, value in arguments(rule).items())
    return (
        "import lagless\n\n"
        f"rule = lagless.{type(rule).__name__}({values})\n"
        "averager = lagless.Averager(model, rule)\n"
        "averager.attach(optimizer)      # before training: from now on every optimizer step counts\n"
        "...                             # train as always\n"
        "with averager.applied():        # at the end, or whenever you evaluate\n"
        '    model.save_pretrained("averaged")'
    )


def scaled_code(result: DemoResult, row: Row) -> str:
    """The same rule for a run of another length: every iterate at the same fraction of the run gets the same weight."""
    rule, steps = row.candidate.rule, result.plan.steps
    values = arguments(rule)
    scaled = [
        f"{name}={value:g}"
        for name, value in values.items()
        if name not in ("half_life", "update_freq", "update_after")
    ]
    if "half_life" in values:
        scaled.insert(0, f"half_life={values['half_life']:g} * stretch")
    else:
        scaled.append("multiplier=1 / stretch")
    scaled += [f"{name}=max(1, round({values[name]:g} * stretch))" for name in ("update_freq", "update_after")]
    return (
        f"stretch = my_total_steps / {steps}\n"
        f"rule = lagless.{type(rule).__name__}(\n    " + ",\n    ".join(scaled) + ",\n)"
    )


def command(result: DemoResult, row: Row) -> str:
    """The command line that makes the same average from the stored checkpoints."""
    rule = row.candidate.rule
    options = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in arguments(rule).items())
    run, out = shlex.quote(str(result.out / "run")), shlex.quote(f"{result.out}-again")
    return f"lagless average {run} -o {out} \\\n    --rule {type(rule).__name__.lower()} {options}"
