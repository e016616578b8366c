"""Advice on the terminal and as a picture."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lagless.experiments.laboratory._checkpoints import estimate_checkpoints
from lagless.experiments.laboratory._drawing import (
    COLOURS,
    MARKERS,
    QUIET,
    Picture,
    label_ends,
    logarithmic,
    new_figure,
    style,
)
from lagless.posthoc.trajectory import StrPath
from lagless.theory import Advice, AveragingProblem, Estimate, Measure, RunEstimate, choose, risk_curve

LIMITS = (
    "Exact for SGD with a constant learning rate on a quadratic with this spectrum, equal noise and equal distance "
    "in all directions. A schedule, momentum, an adaptive optimizer or another loss change it: take the setting as "
    "one to try, and compare it with the live weights on held-out data."
)
_AXIS = {"loss": "excess loss per direction", "distance": "squared distance per direction"}
_MEASURED = {"loss": "excess loss per direction, ½a(μ̂ − μ*)²", "distance": "squared distance per direction, (μ̂ − μ*)²"}


def advise(
    *,
    steps: int | None,
    curvature_min: float | None = None,
    curvature_max: float | None = None,
    noise: float | None = None,
    distance: float | None = None,
    lr: float | None = None,
    run: StrPath | None = None,
    start: StrPath | None = None,
    measure: Measure = "loss",
    update_freq: int | None = None,
    copies: int = 10,
    seed: int = 0,
    plot: str | PathLike[str] | None = None,
    console: Console | None = None,
) -> Advice:
    """Choose a rule for assumed numbers, or for those estimated from a run's checkpoints, and print why.

    Args:
        steps: the horizon in optimizer steps; None for the last step of ``run``.
        curvature_min: as in :class:`~lagless.theory.AveragingProblem`; these five are all needed without ``run``, and
            replace what is estimated with it (each in units of ``lr``, 1 if not given).
        curvature_max: as there.
        noise: as there.
        distance: as there.
        lr: as there.
        run: a run folder whose checkpoints to estimate from.
        start: the checkpoint that is θ_0.
        measure: what settings are ordered by.
        update_freq: as in :func:`~lagless.theory.choose`.
        copies: as there.
        seed: of the sample of parameters.
        plot: a PNG file to write.
        console: where to print; None for standard output.

    Raises:
        ValueError: if numbers are missing or out of range, or the checkpoints cannot tell.
    """
    console = console or Console()
    given: dict[str, Any] = {
        "curvature_min": curvature_min,
        "curvature_max": curvature_max,
        "noise": noise,
        "distance": distance,
        "lr": lr,
    }
    known = {name: value for name, value in given.items() if value is not None}
    if run is None:
        missing = [name for name, value in {**given, "steps": steps}.items() if value is None]
        if missing:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(f"{options}: needed to describe the run; or give --run to estimate from its checkpoints.")
        problem = AveragingProblem(**known, steps=int(steps or 0))
    else:
        estimate = estimate_checkpoints(run, start=start, seed=seed)
        print_estimate(estimate, console)
        estimated = estimate.problem(steps, lr=1.0 if lr is None else lr)
        problem = replace(estimated, **known)
    advice = choose(problem, measure=measure, update_freq=update_freq, copies=copies)
    print_advice(advice, console)
    if plot is not None:
        console.print(f"plot written to {escape(str(save_advice(advice, plot)))}", highlight=False)
    return advice


def print_estimate(estimate: RunEstimate, console: Console) -> None:
    """Print what the checkpoints say, with standard errors."""
    console.print(
        f"estimated from {estimate.checkpoints} checkpoints (steps {estimate.first_step} to {estimate.last_step}, "
        f"which look stationary) and {estimate.coordinates:,} parameters:",
        highlight=False,
    )
    rows = {
        "slowest rate per step, a_min·lr": estimate.rate_min,
        "fastest rate per step, a_max·lr": estimate.rate_max,
        "noise of one step, lr·σ": estimate.step_noise,
        "distance of θ₀ per parameter": estimate.distance,
    }
    for name, value in rows.items():
        console.print(f"  {name:34} {_with_error(value)}", highlight=False)
    console.print(
        f"  fitted to the fluctuations within {estimate.misfit:.1%}; errors are standard errors between groups of "
        "parameters of this one run\n",
        highlight=False,
    )


def _with_error(value: Estimate) -> str:
    return f"{value.mean:.3g} ± {value.standard_error:.2g}"


def print_advice(advice: Advice, console: Console) -> None:
    """Print the best setting of every family, the recommended one, and what the advice cannot know."""
    table = Table(
        title=f"After {advice.problem.steps:,} steps: {_MEASURED[advice.measure]}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("best setting of each family", overflow="fold")
    for heading in ("copies", "bias²", "variance", "total", "below live"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = list(advice.best_of_families)
    if advice.recommended not in shown:
        shown.insert(0, advice.recommended)
    for setting in shown:
        risk = advice.risk(setting)
        mark = "bold" if setting is advice.recommended else ""
        times = advice.total(advice.live) / advice.total(setting)
        numbers = (f"{float(value):.3g}" for value in (risk.bias_squared, risk.variance, risk.total))
        table.add_row(escape(setting.name), str(setting.copies), *numbers, f"{times:.2f} ×", style=mark)
    console.print(table, highlight=False)
    for line in findings(advice):
        console.print(line, highlight=False, markup=False)
    console.print(f"\n{LIMITS}", style="dim", highlight=False)


def findings(advice: Advice) -> list[str]:
    """The recommended setting and what it gains."""
    best = advice.recommended
    if best.rule is None:
        return [f"recommended: no averaging; none of {len(advice.settings) - 1} settings is better by more than 2 %"]
    gain = f"{advice.gain(advice.live):.2f} times lower than that of the live weights"
    if (ema := advice.best_ema) is not None and ema is not best:
        gain += f", {advice.gain(ema):.2f} times lower than that of the best EMA, {ema.name}"
    return [
        f"recommended: {best.name}",
        f"its {advice.measure} is {gain} ({len(advice.settings) - 1} settings compared; within 2 % the fewest copies "
        "win)",
    ]


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
    path = Path(path)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise ValueError(f"plot={str(path)!r}; it must be a .png file in a folder that exists.")
    temporary = path.with_name(f".{path.stem}.tmp.png")
    try:
        with style():
            draw_advice(advice).figure.savefig(temporary, bbox_inches="tight")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
