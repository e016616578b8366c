"""Tables of the bias of Adam-type updates, estimator by estimator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lagless.checkpoints import atomic_file
from lagless.theory import (
    AdamEstimator,
    Estimate,
    FirstOrderAdam,
    FullHistoryAdam,
    GradientLaw,
    InvertedAdam,
    PreconditionerBias,
    UpdateEstimator,
    one_step_bias,
    stationary_bias,
)
from lagless.updates import REFERENCE, Constants


@dataclass(frozen=True)
class Row:
    """An estimator, and what its second half of microbatches is; None where it has no halves."""

    estimator: UpdateEstimator
    halves: Literal["fresh", "rolling", "same"] | None = None

    def law(self, law: GradientLaw) -> GradientLaw:
        """The law with halves as large as the full batch of the others."""
        return law if self.halves is None else replace(law, microbatches=2 * law.microbatches, halves=self.halves)


_LEFT_OUT = AdamEstimator("leave_one_out")
_JACKKNIFE = AdamEstimator("leave_one_out", "jackknife")
_TWO_NODES = AdamEstimator("leave_one_out", two_nodes=True)
_PRE_EMA = AdamEstimator("split", "pre_ema")

ONE_STEP: dict[str, Row] = {
    "Adam": Row(AdamEstimator()),
    "leave one out": Row(_LEFT_OUT),
    "leave one out, two nodes": Row(_TWO_NODES),
    "leave one out, first order": Row(FirstOrderAdam()),
    "leave one out, jackknife": Row(_JACKKNIFE),
    "leave one out, jackknife × 1.5": Row(replace(_JACKKNIFE, constants=Constants(jackknife=1.5))),
    "leave one out, authors' variance": Row(replace(_JACKKNIFE, constants=REFERENCE)),
    "two nodes, inverse of v̂ too": Row(InvertedAdam()),
    "split": Row(AdamEstimator("split"), "fresh"),
    "split, halves the same": Row(AdamEstimator("split"), "same"),
    "split, post-EMA": Row(AdamEstimator("split", "post_ema"), "fresh"),
    "split, pre-EMA": Row(_PRE_EMA, "fresh"),
    "split, pre-EMA, authors' constant": Row(replace(_PRE_EMA, constants=REFERENCE), "fresh"),
    "Adam, post-EMA": Row(AdamEstimator("none", "post_ema")),
    "symmetric": Row(AdamEstimator("symmetric")),
    "symmetric, post-EMA": Row(AdamEstimator("symmetric", "post_ema")),
}
LONG_RUN: dict[str, Row] = {
    "Adam": Row(AdamEstimator()),
    "leave one out": Row(_LEFT_OUT),
    "leave one out, two nodes": Row(_TWO_NODES),
    "split": Row(AdamEstimator("split"), "fresh"),
    "split, rolling": Row(AdamEstimator("split"), "rolling"),
    "split, halves the same": Row(AdamEstimator("split"), "same"),
    "split, post-EMA": Row(AdamEstimator("split", "post_ema"), "fresh"),
    "split, post-EMA, rolling": Row(AdamEstimator("split", "post_ema"), "rolling"),
    "symmetric": Row(AdamEstimator("symmetric")),
}
FULL_HISTORY: dict[str, Row] = {
    "Adam": Row(AdamEstimator()),
    "leave one out": Row(_LEFT_OUT),
    "full history, coupling": Row(FullHistoryAdam(inversion=False)),
    "full history, inversion": Row(FullHistoryAdam(coupling=False)),
    "full history": Row(FullHistoryAdam()),
}
# (law, β₂) of every column
ONE_STEP_COLUMNS = (
    (GradientLaw(0.5, 1.0, 8), 0.5),
    (GradientLaw(0.5, 1.0, 8), 0.95),
    (GradientLaw(0.2, 0.5, 16), 0.95),
)
LONG_RUN_COLUMNS = (
    (GradientLaw(0.5, 1.0, 8), 0.95),
    (GradientLaw(0.2, 1.0, 16), 0.95),
    (GradientLaw(0.5, 1.0, 8), 0.9),
)
FULL_HISTORY_COLUMNS = (
    *LONG_RUN_COLUMNS,
    (GradientLaw(0.5, 1.0, 8, noise="exponential"), 0.95),
    (GradientLaw(0.1, 1.0, 16), 0.95),
)
_BETA1 = 0.9
_PARTS = ("total", "coupling", "inversion")


def print_biases(
    *, samples: int, steps: int, chains: int, seed: int, output: Path | None = None, console: Console | None = None
) -> None:
    """Print the biases of one step and of the long run, in percent of the population update, ± one standard error.

    Args:
        samples: independent steps of the one-step tables.
        steps: per chain of the long run.
        chains: independent ones, from which the standard errors come.
        seed: of the gradients.
        output: JSON file to write the numbers to; None for none.
        console: where to print; None for standard output.

    Raises:
        ValueError: if a number is out of range.
    """
    console = console or Console()
    record: dict[str, dict[str, dict[str, dict[str, float]]]] = {}

    def one_step(row: Row, law: GradientLaw, beta2: float) -> PreconditionerBias:
        return one_step_bias(row.estimator, row.law(law), beta2, samples, seed)

    def long_run(row: Row, law: GradientLaw, beta2: float) -> PreconditionerBias:
        return stationary_bias(row.estimator, row.law(law), (_BETA1, beta2), steps, chains, seed)

    plan = (
        (
            "One step, v at its population value before it",
            ONE_STEP,
            ONE_STEP_COLUMNS,
            one_step,
            ("total",),
        ),
        (f"Long run, β₁ = {_BETA1:g}", LONG_RUN, LONG_RUN_COLUMNS, long_run, _PARTS),
        (f"Both biases to second order, β₁ = {_BETA1:g}", FULL_HISTORY, FULL_HISTORY_COLUMNS, long_run, ("total",)),
    )
    for title, rows, columns, measure, parts in plan:
        for law, beta2 in columns:
            words = _words(law, beta2)
            found = {name: measure(row, law, beta2) for name, row in rows.items()}
            console.print(f"{title}\n{words}", highlight=False)
            console.print(_table(found, parts))
            record[f"{title}; {words}"] = {
                name: {part: getattr(bias, part)._asdict() for part in parts} for name, bias in found.items()
            }
    console.print("Percent of the population update of each one's own preconditioner, ± 1 s.e.", highlight=False)
    if output is not None:
        write_json(record, output)


def _words(law: GradientLaw, beta2: float) -> str:
    noise = "" if law.noise == "normal" else f", {law.noise} noise"
    return f"μ = {law.mean:g}, {law.microbatches} microbatches of deviation {law.std:g}{noise}, β₂ = {beta2:g}"


def _table(found: Mapping[str, PreconditionerBias], parts: tuple[str, ...]) -> Table:
    table = Table("", *parts, box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, bias in found.items():
        table.add_row(name, *(_percent(getattr(bias, part)) for part in parts))
    return table


def _percent(value: Estimate) -> str:
    return f"{100.0 * value.mean:+.3f} ± {100.0 * value.standard_error:.3f}"


def write_json(record: object, path: Path) -> None:
    """Write a JSON file that is there whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
