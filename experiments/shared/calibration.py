"""Figures of predicted against measured differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiments.shared.figures import save, symlog
from matplotlib.figure import Figure

Run = tuple[Mapping[str, float], Mapping[str, float], float | None]  # predicted, measured, nats per unit


def draw_calibration(runs: Mapping[str, Run], path: Path) -> None:
    """Draw measured against predicted nats of every average, one panel for each run."""
    columns = min(3, max(1, len(runs)))
    rows = -(-len(runs) // columns) or 1
    figure = Figure(figsize=(3.2 * columns, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (name, (predicted, measured, unit)) in zip(panels, runs.items(), strict=False):
        axes.set_title(name, fontsize=8)
        axes.plot([-1, 1], [-1, 1], color="0.7", lw=0.8)
        if unit is not None:
            axes.plot([unit * predicted[key] for key in measured], list(measured.values()), ".", ms=3)
        symlog(axes.xaxis, axes.set_xscale)
        symlog(axes.yaxis, axes.set_yscale)
        axes.set(xlim=(-0.15, 1.2), ylim=(-0.15, 1.2))
    for axes in panels[len(runs) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("measured")
    for axes in panels[-columns:]:
        axes.set_xlabel("predicted")
    save(figure, path)


def draw_map(runs: Sequence[Mapping[str, Any]], methods: Sequence[str], path: Path) -> None:
    """Draw BEMA − EMA by run, measured and predicted, one panel for each method."""
    figure = Figure(figsize=(3.0 + 3.4 * len(methods), 1.1 + 0.3 * len(runs)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(methods), sharey=True))
    for axes, method in zip(panels, methods, strict=True):
        for k, (label, marker) in enumerate((("measured", "o"), ("predicted", "x"))):
            found = [(one["map"][method][k], i) for i, one in enumerate(runs) if one["map"][method][k] is not None]
            axes.plot([x for x, _ in found], [y for _, y in found], marker, label=label, ms=5)
        axes.axvline(0.0, color="0.6", lw=0.8)
        axes.set_title(f"{method.removeprefix('bema ')}, minus the EMA", fontsize=8)
        axes.set_xlabel("nats per token")
    panels[0].legend(fontsize=7, frameon=False)
    panels[0].set_yticks(range(len(runs)), [f"{one['name']}{' *' * one['built_on']}" for one in runs], fontsize=8)
    panels[0].invert_yaxis()
    save(figure, path)
