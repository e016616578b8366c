"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lagless.lab.demo._results import DemoResult, Row
from lagless.rules import trajectory_weights

# Okabe and Ito's colours, told apart by colour-blind readers; dashes tell the two of one colour apart in print.
_COLOURS = {"live": "#4d4d4d", "EMA": "#0072B2", "BEMA": "#D55E00", "OUEMA": "#009E73", "DEMA": "#AA4499"}
_MARKERS = {"EMA": "o", "BEMA": "s", "OUEMA": "^", "DEMA": "D"}
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}
# Losses fall steeply at first; what averaging does shows only after this part of the run.
_SHOWN_FROM = 0.2


@dataclass(frozen=True)
class Plot:
    """A picture, and what it shows, in words."""

    file: str
    title: str
    caption: str


def draw_plots(result: DemoResult, folder: Path) -> list[Plot]:
    """Draw all pictures into ``folder``, as PNG."""
    plots = []
    with plt.rc_context(_STYLE):
        for draw in (_curves, _differences, _ages, _memories):
            figure, plot = draw(result)
            figure.savefig(folder / plot.file, bbox_inches="tight")
            plt.close(figure)
            plots.append(plot)
    return plots


def _curves(result: DemoResult) -> tuple[Figure, Plot]:
    figure, axes = plt.subplots(figsize=(8, 4.6))
    lines = _lines(result)
    for label, (steps, losses) in lines.items():
        axes.plot(steps, losses, **_look(label))
    live_steps, live_losses = lines["live"]
    ends = [losses[-1] for _, losses in lines.values()]
    _limit(axes, [live_losses[live_steps >= _SHOWN_FROM * result.plan.steps].max(initial=max(ends)), *ends])
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    _label_ends(axes, lines)
    return figure, Plot(
        "curves.png",
        "Loss on text that was not trained on",
        f"Lower is better; on {result.plan.curve_sequences} sequences of the validation text. The vertical axis starts "
        "where the first fifth of the run has passed, and not at zero.",
    )


def _differences(result: DemoResult) -> tuple[Figure, Plot]:
    figure, axes = plt.subplots(figsize=(8, 4.6))
    live = dict(result.curves["live"])
    lines = {
        label: (steps, losses - np.array([live[step] for step in steps]))
        for label, (steps, losses) in _lines(result).items()
        if label != "live"
    }
    for label, (steps, values) in lines.items():
        axes.plot(steps, values, **_look(label))
    axes.axhline(0.0, color=_COLOURS["live"], linewidth=2)
    axes.annotate(
        "live", (0.005, 0.0), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", color="#4d4d4d"
    )
    lowest = [values.min() for _, values in lines.values()]
    _limit(axes, [0.1, *lowest, *(values[-1] for _, values in lines.values())])
    axes.set(xlabel="optimizer step", ylabel="loss minus that of the live weights")
    _label_ends(axes, lines)
    return figure, Plot(
        "differences.png",
        "The same, as the difference to the live weights",
        "Below the line averaging helps, above it hurts. Curves that leave the picture at the top are that much worse.",
    )


def _ages(result: DemoResult) -> tuple[Figure, Plot]:
    figure, axes = plt.subplots(figsize=(8, 4.6))
    chosen = {id(row.candidate): row for row in result.rows}
    # A few settings extrapolate so far that they would squeeze all others into a line.
    losses = sorted(candidate.validation for candidate in result.candidates)
    top = max(0.1, 2.0 * abs(losses[0]), *(row.candidate.validation for row in result.rows))
    inside = [candidate for candidate in result.candidates if candidate.validation <= top]
    for family, marker in _MARKERS.items():
        points = [c for c in inside if type(c.rule).__name__ == family]
        axes.scatter(
            [c.mean_age for c in points],
            [c.validation for c in points],
            s=[90 if id(c) in chosen else 35 for c in points],
            marker=marker,
            color=_COLOURS[family],
            edgecolor=["black" if id(c) in chosen else "white" for c in points],
            linewidth=1.0,
            label=f"{family} ({len(points)})",
            zorder=3,
        )
    axes.axhline(0.0, color=_COLOURS["live"], linewidth=2)
    axes.axvline(0.0, color="#bbbbbb", linewidth=1)
    axes.set(xlabel="mean age (steps)", ylabel="loss minus that of the live weights")
    axes.legend(frameon=False, loc="best")
    outside = len(result.candidates) - len(inside)
    left_out = f" {outside} settings that are worse than the axis reaches are left out." if outside else ""
    return figure, Plot(
        "ages.png",
        "Every setting that was followed: how old the average is, and how good",
        "Each mark is one setting at the end of the run, on the validation text. An average of little age averages "
        "little noise away; one of great age is a model of long ago. Negative ages extrapolate beyond the present. "
        f"Large marks with a black edge are in the table.{left_out}",
    )


def _memories(result: DemoResult) -> tuple[Figure, Plot]:
    figure, grid = plt.subplots(2, 4, figsize=(11, 5.0), sharex=True, sharey=True, layout="constrained")
    plan = result.plan
    steps = np.arange(plan.warmup, plan.steps + 1)
    for axes, row in zip(grid.flat, result.rows, strict=True):
        share = trajectory_weights(row.candidate.rule, steps).cumsum()
        axes.axhline(0.0, color="#bbbbbb", linewidth=1)
        axes.axhline(1.0, color="#bbbbbb", linewidth=1)
        axes.fill_between(steps, share, step="post", color=_COLOURS[_family(row)], alpha=0.25, linewidth=0)
        axes.step(steps, share, where="post", color=_COLOURS[_family(row)], linewidth=1.8)
        axes.set_title(f"{row.label}, mean age {row.candidate.mean_age:.0f}", fontsize=11)
    figure.supxlabel("optimizer step", fontsize=11)
    figure.supylabel("share of the average", fontsize=11)
    return figure, Plot(
        "memory.png",
        "What each average is made of",
        "The share of the final average that comes from weights up to each step; all of it, 1, at the end. The further "
        "left a curve rises, the older the average. A curve below 0 subtracts the weights it started from, and makes "
        "up for it with a jump at the last step: that is how BEMA moves an old average forward.",
    )


def _lines(result: DemoResult) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and losses of the live weights and of every row of the table; a setting in two rows is drawn once."""
    names = {"live": "live"} | {row.label: row.candidate.name for row in result.rows}
    shown: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for label, name in names.items():
        if name not in list(names.values())[: list(names).index(label)]:
            steps, losses = zip(*result.curves[name], strict=True)
            shown[label] = np.array(steps), np.array(losses)
    return shown


def _family(row: Row) -> str:
    return type(row.candidate.rule).__name__


def _look(label: str) -> dict[str, Any]:
    best = label.startswith("best ")
    colour = _COLOURS[label.removeprefix("best ")]
    return {"color": colour, "linestyle": (0, (4, 1.5)) if best else "-", "linewidth": 2.4 if label == "live" else 2.0}


def _limit(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low)
    axes.set_ylim(low - margin, high + margin)


def _label_ends(axes: Axes, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write each label beside the end of its line, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    apart = 0.062 * (high - low)
    last = max(steps[-1] for steps, _ in lines.values())
    ends = sorted((float(values[-1]), label) for label, (_, values) in lines.items())
    places = _spread([end for end, _ in ends], apart, low + apart / 2, high)
    for (end, label), place in zip(ends, places, strict=True):
        axes.annotate(
            label,
            (last, end),
            (1.03, place),
            xycoords="data",
            textcoords=("axes fraction", "data"),
            va="center",
            color=_COLOURS[label.removeprefix("best ")],
            fontweight="bold" if label == "live" else "normal",
            ha="left",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.8, "shrinkA": 0, "relpos": (0.0, 0.5)},
            annotation_clip=False,
        )
    axes.set_xlim(0, last)


def _spread(ends: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """The places in [low, high] nearest to the increasing ``ends`` that are at least ``apart`` from each other."""
    # Least squares under an order: neighbours that are too close become one block around their mean.
    blocks: list[tuple[float, int]] = []
    for i, end in enumerate(ends):
        mean, size = end - i * apart, 1
        while blocks and blocks[-1][0] > mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    means = [min(max(mean, low), high - (len(ends) - 1) * apart) for mean, size in blocks for _ in range(size)]
    return [mean + i * apart for i, mean in enumerate(means)]
