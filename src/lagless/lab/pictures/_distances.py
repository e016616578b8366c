"""Distance from the minimum against time, as in Fig. 2 and 14(a) of arXiv 2508.00180."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lagless.lab.pictures._drawing import COLOURS, Picture, band, label_ends, listed, logarithmic
from lagless.rules import BEMA, DEMA, EMA, OUEMA, FloatArray, Rule, UniformAverage
from lagless.theory import DistanceCurves, OrnsteinUhlenbeck, distance_curves

PROCESS = OrnsteinUhlenbeck(np.eye(20), mu=0.0, theta0=3.0, eta=0.002, Sigma=7.0)
BIAS_POWERS = (0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.4, 0.5)
_TENTH = 0.1
_BOUND = "best unbiased"
_LINES = {
    "last iterate": ("live", "-"),
    "EMA": ("EMA", "-"),
    "EMA κ=0.5": ("EMA", "--"),
    "uniform average": ("UniformAverage", "-"),
    "DEMA": ("DEMA", "-"),
    "OUEMA": ("OUEMA", "-"),
    "OUEMA η=0.3": ("OUEMA", "--"),
    "BEMA": ("BEMA", "-"),
    "BEMA η=0.3": ("BEMA", "--"),
    "BEMA κ=0.5": ("BEMA", ":"),
}


def follow_rules(*, steps: int = 2000, paths: int = 1000, points: int = 200, seed: int = 0) -> DistanceCurves:
    """Ten rules on :data:`PROCESS`, exactly and on sampled paths.

    The paper gives no noise, step and horizon. Here the horizon is T = 4, after which e^{-4} of the start is left, and
    the noise leaves the last iterate at less than a tenth of the starting distance.
    """
    at = sorted({max(1, round(steps * i / points)) for i in range(1, points + 1)})
    rules = _rules(tuned_bias_power(BEMA, steps), tuned_bias_power(OUEMA, steps))
    return distance_curves(PROCESS, rules, steps=steps, at=at, paths=paths, seed=seed)


def tuned_bias_power(kind: type[BEMA] | type[OUEMA], steps: int) -> float:
    """The η of :data:`BIAS_POWERS` with the smallest root mean square distance, averaged over the run, at κ = 1."""
    at = list(range(max(1, steps // 100), steps + 1, max(1, steps // 100)))
    rules = {str(power): kind(ema_power=1.0, bias_power=power, update_freq=1) for power in BIAS_POWERS}
    risks = PROCESS.risks(rules, steps=steps, at=at)
    return float(min(risks, key=lambda name: float(np.sqrt(risks[name].total).mean())))


def _rules(bema: float, ouema: float) -> dict[str, Rule]:
    return {
        "last iterate": EMA(ema_power=0.0),
        "EMA": EMA(ema_power=1.0),
        "EMA κ=0.5": EMA(ema_power=0.5),
        "uniform average": UniformAverage(),
        "DEMA": DEMA.paper(ema_power=1.0, update_freq=1),
        "OUEMA": OUEMA.paper(ema_power=1.0, bias_power=ouema, update_freq=1),
        "OUEMA η=0.3": OUEMA.paper(ema_power=1.0, bias_power=0.3, update_freq=1),
        "BEMA": BEMA.paper(ema_power=1.0, bias_power=bema, update_freq=1),
        "BEMA η=0.3": BEMA.paper(ema_power=1.0, bias_power=0.3, update_freq=1),
        "BEMA κ=0.5": BEMA.paper(ema_power=0.5, bias_power=0.3, update_freq=1),
    }


def draw_figure_2(curves: DistanceCurves) -> Picture:
    """Last iterate, EMA, OUEMA and BEMA."""
    steps = int(curves.steps[-1])
    powers = f"BEMA {tuned_bias_power(BEMA, steps):g}, OUEMA {tuned_bias_power(OUEMA, steps):g}"
    return _picture(
        curves,
        ("last iterate", "EMA", "OUEMA", "BEMA"),
        "figure-2",
        "Figure 2: how fast averages get to the minimum",
        f"Twenty dimensions, A = I, ‖θ₀ − μ*‖ = {start_distance(curves):.1f}, {steps:,} steps of η = {PROCESS.eta:g} "
        f"with noise Σ = {PROCESS.Sigma[0, 0]:g}I; all averages have κ = 1, BEMA and OUEMA the bias power that is "
        f"best on average over this run ({powers}). ",
    )


def draw_figure_14a(curves: DistanceCurves) -> Picture:
    """The same with DEMA."""
    return _picture(
        curves,
        ("last iterate", "EMA", "DEMA", "OUEMA", "BEMA"),
        "figure-14a",
        "Figure 14(a): the same with DEMA",
        f"The process and paths of Figure 2. {_dema(curves)}",
        brief=True,
    )


def draw_ten_rules(curves: DistanceCurves) -> Picture:
    """All rules that were followed."""
    return _picture(
        curves,
        tuple(curves.exact),
        "ten-rules",
        "Ten rules: the setting matters as much as the rule",
        "The process and paths of Figure 2 once more, with other settings in dashes and dots; κ = 1 and the bias "
        f"power of Figure 2 where none is given (BEMA κ=0.5 has η = 0.3). {_arrivals(curves, tuple(curves.exact))}",
        brief=True,
    )


def reached(curves: DistanceCurves, name: str, share: float = _TENTH) -> float | None:
    """The first step at which the root mean square distance of ``name`` is below ``share`` of that of θ_0."""
    distance = rms(curves, name)
    below = distance < share * start_distance(curves)
    return float(curves.steps[int(np.argmax(below))]) if below.any() else None


def rms(curves: DistanceCurves, name: str) -> FloatArray:
    """√E‖μ̂ - μ*‖² at every step."""
    return np.sqrt(np.asarray(curves.exact[name].total))


def start_distance(curves: DistanceCurves) -> float:
    """‖θ_0 - μ*‖, from the bias of the last iterate: e^{-t} of it is left at time t."""
    bias = np.sqrt(np.asarray(curves.exact["last iterate"].bias_squared))
    return float(bias[0] * np.exp(curves.times[0]))


def _picture(
    curves: DistanceCurves, names: tuple[str, ...], file: str, title: str, caption: str, brief: bool = False
) -> Picture:
    figure = Figure(figsize=(11.5, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[4.0, 1.0])
    left, right, strip = (figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :]))
    _curves(left, curves, names)
    left.set(title="from the start", ylabel="root mean square distance from μ*")
    left.set_ylim(0.0, 1.03 * start_distance(curves))
    _curves(right, curves, names)
    right.set(title="the same, logarithmic")
    logarithmic(right, "y")
    values = np.concatenate([rms(curves, name) for name in names])
    right.set_ylim(0.8 * min(values.min(), curves.optimum.min() ** 0.5), 1.15 * start_distance(curves))
    _deviations(strip, curves, names)
    for axes in (left, right, strip):
        axes.set_xlim(0, curves.steps[-1])
    for axes in (right, strip):
        axes.set_xlabel("optimizer step")
    left.set_xlabel("optimizer step")
    ends = {name: (curves.steps[-1], rms(curves, name)[-1], COLOURS[_LINES[name][0]]) for name in names}
    ends[_BOUND] = (curves.steps[-1], float(curves.optimum[-1]) ** 0.5, COLOURS["bound"])
    label_ends(right, ends)
    numbers = _numbers(curves, names)
    return Picture(file, title, caption if brief else caption + _words(curves, names), figure, numbers)


def _deviations(axes: Axes, curves: DistanceCurves, names: tuple[str, ...]) -> None:
    """By how many percent the sampled squared distance misses the exact one, ± 2 standard errors."""
    for name in names:
        family, dashes = _LINES[name]
        sampled, exact = curves.sampled[name], np.asarray(curves.exact[name].total)
        miss = 100.0 * (np.asarray(sampled.total) / exact - 1.0)
        error = 200.0 * np.asarray(sampled.standard_error) / exact
        axes.fill_between(curves.steps, miss - error, miss + error, color=COLOURS[family], alpha=0.18, linewidth=0)
        axes.plot(curves.steps, miss, color=COLOURS[family], linestyle=dashes, linewidth=1.0)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(ylabel="%", title="sampled against exact squared distance: difference and ± 2 standard errors")


def _curves(axes: Axes, curves: DistanceCurves, names: tuple[str, ...]) -> None:
    for name in names:
        family, dashes = _LINES[name]
        sampled = curves.sampled[name]
        band(axes, curves.steps, np.asarray(sampled.total), np.asarray(sampled.standard_error), COLOURS[family])
        axes.plot(curves.steps, rms(curves, name), color=COLOURS[family], linestyle=dashes, linewidth=1.8)
    axes.plot(curves.steps, np.sqrt(curves.optimum), color=COLOURS["bound"], linestyle=(0, (1, 1.5)), linewidth=1.8)


def _words(curves: DistanceCurves, names: tuple[str, ...]) -> str:
    paths = next(iter(curves.sampled.values())).paths
    final = sorted(names, key=lambda name: rms(curves, name)[-1])
    at_end = listed([f"{name} {rms(curves, name)[-1]:.2f}" for name in final])
    return (
        f"Lines are exact. The rules also ran, as in training, on {paths:,} sampled paths: the bands, ± 2 standard "
        f"errors, are so narrow that the strip below shows them again. {_arrivals(curves, names)} At the end: "
        f"{at_end}; the dotted line, {curves.optimum[-1] ** 0.5:.2f} there, is what the maximum likelihood estimator, "
        f"which knows A, attains and no unbiased estimator can beat.{_rebound(curves, names)}"
    )


def _arrivals(curves: DistanceCurves, names: tuple[str, ...]) -> str:
    steps = {name: step for name in names if (step := reached(curves, name)) is not None}
    never = [name for name in names if name not in steps]
    order = sorted(steps, key=steps.__getitem__)
    words = "A tenth of the starting distance is left "
    if order:
        words += "after " + listed([f"{steps[name]:,.0f} steps ({name})" for name in order])
    if never:
        words += f"{', and ' if order else ''}not within the run for {listed(never)}"
    return words + "."


def _rebound(curves: DistanceCurves, names: tuple[str, ...]) -> str:
    back: list[str] = []
    for name in names:
        distance = rms(curves, name)
        low = int(np.argmin(distance))
        if distance[-1] > 1.2 * distance[low]:
            back.append(f"{name} (lowest, {distance[low]:.2f}, at step {curves.steps[low]:.0f})")
    if not back:
        return ""
    return (
        f" {listed(back)} overshoot{'s' if len(back) == 1 else ''} and get{'s' if len(back) == 1 else ''} worse again: "
        "a correction that helps early is too strong later, unless it is weakened as the run gets longer."
    )


def _dema(curves: DistanceCurves) -> str:
    ahead = "ahead of" if (rms(curves, "DEMA") < rms(curves, "EMA")).all() else "not always ahead of"
    three = _arrivals(curves, ("DEMA", "OUEMA", "BEMA"))
    end = {name: rms(curves, name)[-1] for name in ("DEMA", "OUEMA", "BEMA")}
    return (
        f"DEMA, twice the EMA minus the EMA of the EMA, is {ahead} the EMA with the same κ. {three} It is a "
        f"correction that needs no setting: at the end of this run DEMA is at {end['DEMA']:.2f}, OUEMA at "
        f"{end['OUEMA']:.2f}, BEMA at {end['BEMA']:.2f}."
    )


def _numbers(curves: DistanceCurves, names: tuple[str, ...]) -> Mapping[str, object]:
    every = slice(None, None, max(1, len(curves.steps) // 200))
    return {
        "steps": curves.steps[every],
        "largest_z": curves.largest_z(),
        "optimum_squared": curves.optimum[every],
        "rules": {
            name: {
                "exact_squared": np.asarray(curves.exact[name].total)[every],
                "sampled_squared": np.asarray(curves.sampled[name].total)[every],
                "standard_error": np.asarray(curves.sampled[name].standard_error)[every],
                "steps_to_a_tenth": reached(curves, name),
                "rms_at_end": rms(curves, name)[-1],
            }
            for name in names
        },
    }
