"""Pulling iterates to their average: what it does to the limit, what it costs in rate, and five ways to control."""

from __future__ import annotations

from math import ceil

import numpy as np
from matplotlib.axes import Axes

from lagless.lab.pictures._drawing import COLOURS, QUIET, Picture, logarithmic, new_figure
from lagless.rules import FloatArray
from lagless.theory import (
    Control,
    ControlProblem,
    ConvexGuarantee,
    Estimate,
    PullRecursion,
    absolute_value_gap,
    certainty_equivalent_control,
    compare_over_spectrum,
    control_cost,
    full_pull_improvement,
    largest_stable_gain,
    matched_ema,
    no_control,
    optimal_gain,
    oracle_control,
    plug_in_control,
    practical_control,
    simulate_recursion,
)

A, B = 0.1, 0.05
_SPECTRUM = np.geomspace(1e-3, 0.5, 40)
_PULL, _FREE = COLOURS["BEMA"], COLOURS["EMA"]

# Far from the minimum with little noise, and near it with much: (rate, noise, horizon, penalty, prior_std).
PROBLEMS: dict[str, ControlProblem] = {
    "a = 1, T = 20": ControlProblem(rate=1.0, noise=1.0, horizon=20.0, penalty=0.01),
    "a = 0.1, T = 20": ControlProblem(rate=0.1, noise=1.0, horizon=20.0, penalty=0.01),
    "a = 0.3, T = 50": ControlProblem(rate=0.3, noise=2.0, horizon=50.0, penalty=0.001),
    "a = 0.05, T = 100": ControlProblem(rate=0.05, noise=0.3, horizon=100.0, penalty=0.1, prior_std=2.0),
}
_CONTROLS: dict[str, tuple[Control, str, str]] = {
    "none": (no_control, COLOURS["live"], "o"),
    "minimum known": (oracle_control, COLOURS["bound"], "*"),
    "posterior mean": (certainty_equivalent_control, COLOURS["OUEMA"], "^"),
    "running average": (plug_in_control, COLOURS["DEMA"], "D"),
    "running average, early gain": (practical_control, COLOURS["BEMA"], "s"),
}


def sampled_variance(recursion: PullRecursion, paths: int, seed: int) -> Estimate:
    """The stationary variance of the average by Monte Carlo; the minimum is at 0, so it is the mean square."""
    steps = ceil(4.0 / (1.0 - recursion.contraction))
    squares = simulate_recursion(recursion, steps, paths, seed).average ** 2
    return Estimate(float(squares.mean()), float(squares.std(ddof=1)) / paths**0.5)


def draw_pull(
    seed: int = 0, paths: int = 4000, gains: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 1.8)
) -> Picture:
    """Stationary variance of the average and contraction against the gain, with an EMA that contracts as slowly."""
    largest, best = largest_stable_gain(A, B), optimal_gain(A, B)
    c = np.concatenate([np.linspace(0.0, 0.3, 80), np.linspace(0.3, 0.995 * largest, 200)[1:]])
    pulled = [PullRecursion(A, B, float(gain)) for gain in c]
    matched = [matched_ema(recursion) for recursion in pulled]
    sampled = {gain: sampled_variance(PullRecursion(A, B, gain), paths, seed) for gain in gains}

    figure, (variance, rate) = new_figure(11.5, 4.6, columns=2)
    variance.plot(c, [r.ema_variance for r in pulled], color=_PULL, linewidth=2.2, label="pulled, exact")
    variance.plot(
        c, [r.ema_variance for r in matched], color=_FREE, linestyle=(0, (4, 2)), label="not pulled: EMA as slow, exact"
    )
    variance.errorbar(
        list(sampled),
        [s.mean for s in sampled.values()],
        yerr=[2.0 * s.standard_error for s in sampled.values()],
        fmt="o",
        markersize=4,
        capsize=4,
        color="black",
        label=f"pulled, {paths:,} paths ± 2 s.e.",
        zorder=4,
    )
    variance.set(ylabel="stationary variance of the average")
    variance.legend(loc="upper left", bbox_to_anchor=(0.06, 1.0))
    rate.plot(c, [1.0 - r.contraction for r in pulled], color=_PULL, linewidth=2.2)
    rate.set(ylabel="1 − ρ, share of the distance lost per step")
    variance.set_title("the limit", pad=18)
    rate.set_title("the rate", pad=18)
    for axes in (variance, rate):
        logarithmic(axes, "y")
        axes.set_xlabel("gain c of the pull")
        axes.set_xlim(-0.03, largest * 1.02)
        _mark_gains(axes, best, largest)

    at_0, at_1 = PullRecursion(A, B), PullRecursion(A, B, 1.0)
    numbers = {
        "a": A,
        "b": B,
        "c": c,
        "variance": [r.ema_variance for r in pulled],
        "matched_variance": [r.ema_variance for r in matched],
        "contraction": [r.contraction for r in pulled],
        "sampled": {str(gain): s._asdict() for gain, s in sampled.items()},
        "optimal_gain": best,
        "largest_stable_gain": largest,
        "variance_gain_at_1": at_0.ema_variance / at_1.ema_variance,
        "slowdown_at_1": (1.0 - at_0.contraction) / (1.0 - at_1.contraction),
        "matched_ratio_at_1": matched_ema(at_1).ema_variance / at_1.ema_variance,
        "spectrum": compare_over_spectrum(_SPECTRUM, b=1e-3, c=1.0).__dict__,
    }
    return Picture("pull", "PACE: a pull to the average, its limit and its rate", _pull_words(numbers), figure, numbers)


def _mark_gains(axes: Axes, best: float, largest: float) -> None:
    for place, label, side in ((1.0, "1: PACE's limit", "center"), (best, "c*", "right"), (largest, "c_max", "left")):
        axes.axvline(place, color=QUIET, linewidth=0.9, linestyle=":")
        axes.annotate(
            label,
            (place, 1.0),
            (0, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha=side,
            va="bottom",
            color=QUIET,
            fontsize=9.5,
        )


def _pull_words(numbers: dict) -> str:
    spectrum = numbers["spectrum"]
    error = spectrum["ema_error"] / spectrum["pulled_error"]
    loss = spectrum["ema_loss"] / spectrum["pulled_loss"]
    verdict = "better" if error < 1.0 and loss < 1.0 else "not better on both"
    return (
        f"One coordinate, a = {A:g} (learning rate × curvature), β = {B:g}. Left: at fixed β a full pull, c = 1, "
        f"lowers the variance at which the average settles {numbers['variance_gain_at_1']:.0f}-fold; the best gain is "
        f"c* = {numbers['optimal_gain']:.2f}, and from c_max = {numbers['largest_stable_gain']:.2f} on it diverges. "
        f"Right: the same pull makes the slowest mode {numbers['slowdown_at_1']:.0f} times slower. The dashed line is "
        "a plain EMA of unpulled SGD that contracts exactly as slowly: at c = 1 its variance is "
        f"{numbers['matched_ratio_at_1']:.3f} times that of the pulled one. So in this model a pull buys nothing that "
        "a longer EMA would not; what it changes is how β must be read. Over 40 curvatures spread from 0.001 to 0.5 "
        f"(β = 0.001, c = 1), matched in its slowest rate, the EMA is even {verdict}: {error:.2f} times the squared "
        f"error, {loss:.2f} times the loss."
    )


def draw_guarantees(seed: int = 0, paths: int = 200) -> Picture:
    """The family with unbounded improvement and its cost; the convex bound and the gap it bounds."""
    figure, (family, convex) = new_figure(11.5, 4.6, columns=2)
    x = np.geomspace(1e-3, 0.12, 60)
    share = 0.999  # β = 0.999 a: the statement is for β < a
    better = np.array([full_pull_improvement(a, share * a) for a in x])
    free = [PullRecursion(a, share * a) for a in x]
    pulled = [PullRecursion(a, share * a, 1.0) for a in x]
    slower = np.array([(1.0 - f.contraction) / (1.0 - p.contraction) for f, p in zip(free, pulled, strict=True)])
    tuned = np.array([f.ema_variance / matched_ema(p).ema_variance for f, p in zip(free, pulled, strict=True)])
    family.plot(x, better, color=_PULL, linewidth=2.2, label="γ₀(c = 0)/γ₀(c = 1), exact")
    family.plot(x, tuned, color=_FREE, linestyle=(0, (4, 2)), label="the same for an EMA as slow")
    family.plot(x, 1.0 / (8.0 * x), color=QUIET, linestyle=":", label="bound 1/(8a)")
    family.plot(x, slower, color=COLOURS["bound"], linewidth=1.4, label="how many times slower, 1 − ρ")
    logarithmic(family, "xy")
    family.set(xlabel=f"a, with β = {share} a", ylabel="factor", title="a family without limit, and its price")
    family.legend(loc="upper right")

    horizons, gains = (100, 300, 1000, 3000), (0.0, 1.0)
    bounds: dict[float, list[float]] = {}
    gaps: dict[float, list[Estimate]] = {}
    for gain, colour in zip(gains, (_FREE, _PULL), strict=True):
        guarantee = ConvexGuarantee(distance=(1.0,), gains=(gain,), b=0.1, lipschitz=1.0, noise=1.0)
        rates = [np.full(steps, guarantee.best_learning_rate(steps)) for steps in horizons]
        bounds[gain] = [guarantee.bound(eta) for eta in rates]
        gaps[gain] = [absolute_value_gap(guarantee, eta, paths, seed) for eta in rates]
        convex.plot(horizons, bounds[gain], color=colour, linestyle=":", label=f"c = {gain:g}, bound")
        convex.errorbar(
            horizons,
            [gap.mean for gap in gaps[gain]],
            yerr=[2.0 * gap.standard_error for gap in gaps[gain]],
            fmt="o-",
            capsize=4,
            color=colour,
            label=f"c = {gain:g}, {paths:,} runs ± 2 s.e.",
        )
    logarithmic(convex, "xy")
    convex.set(xlabel="steps", ylabel="E F(θ̄) − F*", title="convex: F(θ) = |θ|")
    convex.legend(loc="lower left")
    low, high = x[0], x[-1]
    caption = (
        f"Left: with a and β → 0 together, a full pull lowers the stationary variance without limit, "
        f"{better[-1]:.0f}-fold at a = {high:g} and {better[0]:,.0f}-fold at a = {low:g}, above the paper's 1/(8a). It "
        f"contracts {slower[-1]:.0f} and {slower[0]:,.0f} times more slowly for that, and a plain EMA that is as slow "
        f"gains {tuned[-1]:.0f}- and {tuned[0]:,.0f}-fold. Right: |θ| from θ = 1, gradient noise 1, β = 0.1, each at "
        f"the learning rate with the best bound. The flat average of the iterates stays below its bound; after "
        f"{horizons[-1]:,} steps the gap is {gaps[0.0][-1].mean:.4f} without a pull (bound {bounds[0.0][-1]:.3f}) and "
        f"{gaps[1.0][-1].mean:.4f} with a full one (bound {bounds[1.0][-1]:.3f})."
    )
    numbers = {
        "a": x,
        "improvement": better,
        "slowdown": slower,
        "improvement_of_matched_ema": tuned,
        "steps": horizons,
        "bounds": {str(gain): values for gain, values in bounds.items()},
        "gaps": {str(gain): [gap._asdict() for gap in found] for gain, found in gaps.items()},
    }
    return Picture("guarantees", "PACE: two guarantees and what they cost", caption, figure, numbers)


def draw_controls(intervals: int = 1000) -> Picture:
    """What five controls cost on four problems, relative to none."""
    costs = {
        problem: {
            name: control_cost(PROBLEMS[problem], control, intervals) for name, (control, *_) in _CONTROLS.items()
        }
        for problem in PROBLEMS
    }
    figure, (axes,) = new_figure(9.5, 4.3)
    for row, found in enumerate(costs.values()):
        if row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color="#f3f4f6", zorder=0)
        for place, (name, (_, colour, marker)) in enumerate(_CONTROLS.items()):
            ratio = found[name].total / found["none"].total
            size = 13 if marker == "*" else 8.5
            height = row + 0.16 * (place - 2)
            axes.plot(ratio, height, marker, color=colour, markersize=size, label=name if row == 0 else None)
    axes.axvline(1.0, color=COLOURS["live"], linewidth=1)
    axes.set_yticks(range(len(costs)), list(costs))
    axes.set_ylim(len(costs) - 0.5, -0.5)
    axes.set_xlabel("cost J, relative to no control (logarithmic; left is better)")
    logarithmic(axes, "x")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), title="what is taken for the minimum", alignment="left")
    numbers = {
        problem: {
            name: {"error": cost.error, "effort": cost.effort, "total": cost.total} for name, cost in found.items()
        }
        for problem, found in costs.items()
    }
    record = {"problems": {name: vars(problem) for name, problem in PROBLEMS.items()}, "costs": numbers}
    return Picture("controls", "Five controls, four problems", _control_words(numbers), figure, record)


def _control_words(numbers: dict[str, dict[str, dict[str, float]]]) -> str:
    def ratios(name: str) -> FloatArray:
        return np.array([found[name]["total"] / found["none"]["total"] for found in numbers.values()])

    optimal, practical = ratios("posterior mean"), ratios("running average, early gain")
    plug_in = ratios("running average")
    worse = int((practical > 1.0).sum()), int((plug_in > 1.0).sum())
    always = "never costs more than none" if (optimal <= 1.0).all() else "sometimes costs more than none"
    return (
        "J adds the squared error of the returned average and the price of the control; all values are exact. If the "
        f"minimum were known (stars), {ratios('minimum known').min():.2f} to {ratios('minimum known').max():.2f} of "
        f"the cost would be left. The optimal control, which uses the posterior mean of the minimum, {always} "
        f"({optimal.min():.2f} to {optimal.max():.2f}). PACE's step to practice puts the running average in its "
        f"place: with the optimal gain that costs more than doing nothing in {worse[1]} of {len(numbers)} problems, "
        f"with the gain of early times in {worse[0]}: a running average is not an estimate of the minimum while the "
        "run is still travelling."
    )
