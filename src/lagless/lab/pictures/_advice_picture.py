"""Advice as a picture."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from lagless.checkpoints import atomic_file
from lagless.lab.pictures._advice import findings
from lagless.lab.pictures._drawing import (
    COLOURS,
    MARKERS,
    QUIET,
    Picture,
    label_ends,
    logarithmic,
    new_figure,
    style,
)
from lagless.theory import Advice, risk_curve

_AXIS = {"loss": "excess loss per direction", "distance": "squared distance per direction"}


def draw_advice(advice: Advice, points: int = 60) -> Picture:
    """Every setting by bias² and variance, and the best of each family against time."""
    figure, (plane, time) = new_figure(12.0, 4.9, columns=2)
    _draw_settings(plane, advice)
    at = np.unique(np.geomspace(max(1, advice.problem.steps // 200), advice.problem.steps, points).astype(int))
    ends: dict[str, tuple[float, float, str]] = {}
    for setting in advice.best_of_families:
        total = np.asarray(risk_curve(advice.problem, setting.rule, at.tolist(), advice.measure).total)
        width = 2.8 if setting is advice.recommended else 1.6
        time.plot(at, total, color=COLOURS[setting.family], linewidth=width)
        ends[setting.family] = (float(at[-1]), float(total[-1]), COLOURS[setting.family])
    logarithmic(time, "xy")
    time.set_xlim(at[0], at[-1])
    time.set(xlabel="optimizer step", ylabel=_AXIS[advice.measure], title="best of each family against time")
    label_ends(time, ends)
    caption = " ".join(findings(advice))
    numbers = {
        s.name: {"loss": vars(s.loss), "distance": vars(s.distance), "copies": s.copies} for s in advice.settings
    }
    return Picture("advice", "Which rule?", caption, figure, numbers)


def _draw_settings(axes: Axes, advice: Advice) -> None:
    totals = [advice.total(setting) for setting in advice.settings]
    shown = [s for s, total in zip(advice.settings, totals, strict=True) if total < 20.0 * totals[0]]
    for family in dict.fromkeys(setting.family for setting in shown):
        risks = [advice.risk(setting) for setting in shown if setting.family == family]
        axes.plot(
            [float(risk.bias_squared) for risk in risks],
            [float(risk.variance) for risk in risks],
            MARKERS[family],
            color=COLOURS[family],
            markersize=12 if family == "live" else 6,
            alpha=0.8,
            linestyle="none",
            label=family,
        )
    best = advice.risk(advice.recommended)
    axes.plot(
        float(best.bias_squared),
        float(best.variance),
        "o",
        markersize=15,
        markerfacecolor="none",
        markeredgecolor="black",
    )
    logarithmic(axes, "x", ticks=(1.0,))
    logarithmic(axes, "y")
    low, high = axes.get_xlim()
    bias = np.geomspace(low, high, 300)
    for factor in (1.0, 2.0, 5.0):
        level = factor * totals[0]
        inside = bias < level
        axes.plot(bias[inside], level - bias[inside], color="#c4c4c4", linewidth=0.9, zorder=0)
        axes.annotate(
            f"{factor:g} × the least", (low, level), (4, 2), textcoords="offset points", color=QUIET, fontsize=8.5
        )
    axes.set_xlim(low, high)
    axes.set_ylim(0.5 * min(float(advice.risk(s).variance) for s in shown), 6.0 * totals[0])
    axes.set(xlabel=f"bias², in the {advice.measure}", ylabel=f"variance, in the {advice.measure}")
    axes.set_title("all settings (circled: recommended)")
    axes.legend(fontsize=9, loc="lower left", ncols=2)


def save_advice(advice: Advice, path: str | PathLike[str]) -> Path:
    """Write :func:`draw_advice` as PNG.

    Raises:
        ValueError: if the name does not end in ``.png`` or its folder does not exist.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise ValueError(f"plot={str(path)!r}; it must be a .png file in a folder that exists.")
    with atomic_file(path) as partial, style():
        draw_advice(advice).figure.savefig(partial, format="png", bbox_inches="tight")
    return path
