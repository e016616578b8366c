"""Figures of averages against the live weights of their runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiments.shared.averages import ETAS, FRACTIONS, KAPPAS
from experiments.shared.comparisons import Cells, Condition, against_live
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lagless.checkpoints import atomic_file

COLOURS = {1e-3: "tab:red", 3e-4: "tab:orange", 1e-4: "tab:blue"}
PART = "reporting"
TICKS = (-0.1, -0.05, 0.0, 0.05, 0.2, 0.8)
LINEAR = 0.05  # below it the axis is linear, above it logarithmic


def draw_shown(rows: Sequence[Mapping[str, Any]], floor: float, path: Path) -> None:
    """Draw the difference to the live weights by rule, one panel for each schedule, batch and optimizer."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    kinds = list(dict.fromkeys(_kind(row["condition"]) for row in rows))
    figure = Figure(figsize=(2.0 + 3.4 * len(kinds), 0.9 + 0.32 * len(labels)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(kinds), sharex=True, sharey=True))
    for axes, kind in zip(panels, kinds, strict=True):
        own = [row for row in rows if _kind(row["condition"]) == kind]
        rates = sorted({row["condition"]["rate"] for row in own}, reverse=True)
        for k, rate in enumerate(rates):
            mine = [row for row in own if row["condition"]["rate"] == rate]
            axes.errorbar(
                [row["difference"] for row in mine],
                [labels.index(row["label"]) + 0.22 * (k - (len(rates) - 1) / 2) for row in mine],
                xerr=[row["standard_error"] for row in mine],
                fmt="o", ms=4, color=COLOURS.get(rate), label=f"rate {rate:g}, n = {mine[0]['seeds']}",
            )  # fmt: skip
        axes.axvspan(-floor, floor, color="0.85", lw=0)
        symlog(axes.xaxis, axes.set_xscale)
        axes.set(title=kind, xlabel="nats per token minus live")
        axes.legend(fontsize=7, frameon=False)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    save(figure, path)


def draw_widths(cells: Cells, path: Path) -> None:
    """Draw the difference to the live weights by κ on the paper's clock and by relative width, one column each run."""
    conditions = [c for c in cells if c.optimizer == "adamw" and c.batch == 8]
    figure = Figure(figsize=(1.0 + 3.0 * len(conditions), 5.6), layout="constrained")
    panels = figure.subplots(2, len(conditions), sharey="row", squeeze=False)
    for column, condition in enumerate(conditions):
        power = {"EMA": [f"ema kappa={k:g} phi=400" for k in KAPPAS]}
        power |= {f"BEMA η = {e:g}": [f"bema kappa={k:g} eta={e:g} phi=400" for k in KAPPAS] for e in ETAS}
        free = {
            "EMA": [f"ema-f f={f:g}" for f in FRACTIONS],
            "BEMA, θ_0, c = 0.5": [f"bema-f f={f:g} c=0.5" for f in FRACTIONS],
            "BEMA, slow anchor, c = 0.5": [f"slow-bema-f f={f:g} c=0.5" for f in FRACTIONS],
            "DEMA": [f"dema-f f={f:g}" for f in FRACTIONS],
        }
        for row, (xs, lines) in enumerate(((KAPPAS, power), (FRACTIONS, free))):
            axes = panels[row, column]
            for label, names in lines.items():
                axes.plot(
                    xs, [against_live(cells[condition], name, PART).value for name in names], "o-", ms=3, label=label
                )
            axes.axhline(0.0, color="0.6", lw=0.8)
            symlog(axes.yaxis, axes.set_yscale)
            axes.set(xlabel=("κ", "f")[row], title=_title(condition, len(cells[condition])) if row == 0 else "")
    for row in (0, 1):
        panels[row, 0].set_ylabel("nats per token minus live")
        panels[row, 0].legend(fontsize=7, frameon=False)
    save(figure, path)


def _kind(at: Mapping[str, Any]) -> str:
    return f"{at['optimizer']}, {at['schedule']}, batch {at['batch']}"


def _title(condition: Condition, seeds: int) -> str:
    return f"{condition.rate:g}, {condition.schedule}, n = {seeds}"


def symlog(axis: Any, set_scale: Any) -> None:
    """Make an axis linear about 0 and logarithmic beyond, with few ticks."""
    set_scale("symlog", linthresh=LINEAR)
    axis.set_ticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("wb") as file:
        figure.savefig(file, format="png", dpi=90, metadata={"Software": None})
