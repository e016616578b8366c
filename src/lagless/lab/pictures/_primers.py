"""The figures of the primers in the documentation."""

from __future__ import annotations

import numpy as np

from lagless.lab.pictures._drawing import COLOURS, QUIET, Picture, label_ends, logarithmic, new_figure
from lagless.lab.pictures._interpolation import draw_interpolation
from lagless.rules import BEMA, EMA, OUEMA, FloatArray, Rule, UniformAverage, trajectory_weights, weight_on_start
from lagless.theory import (
    AdamEstimator,
    AveragingProblem,
    Estimator,
    FlatAverage,
    GradientLaw,
    LastIterate,
    MaximumLikelihood,
    OrnsteinUhlenbeck,
    PlugInMaximumLikelihood,
    PullRecursion,
    cramer_rao,
    matched_ema,
    risk_curve,
    stationary_bias,
)

LAG_PROBLEM = AveragingProblem(curvature_min=0.01, curvature_max=1.0, noise=1.0, distance=10.0, lr=0.1, steps=2000)


def draw_lag_versus_variance() -> Picture:
    """Bias², variance and their sum against the half-life of an EMA."""
    half_lives = np.geomspace(1.0, LAG_PROBLEM.steps, 45)
    risks = [risk_curve(LAG_PROBLEM, EMA(half_life=float(h)), [LAG_PROBLEM.steps]) for h in half_lives]
    bias, variance = (np.array([np.ravel(getattr(r, part))[0] for r in risks]) for part in ("bias_squared", "variance"))
    total = bias + variance
    live = float(np.ravel(risk_curve(LAG_PROBLEM, None, [LAG_PROBLEM.steps]).total)[0])
    best = int(np.argmin(total))
    figure, (axes,) = new_figure(8.5, 4.4)
    axes.plot(half_lives, bias, color=COLOURS["BEMA"], linestyle="--", linewidth=1.8)
    axes.plot(half_lives, variance, color=COLOURS["OUEMA"], linestyle=":", linewidth=2.2)
    axes.plot(half_lives, total, color=COLOURS["EMA"], linewidth=2.4)
    axes.plot(half_lives[best], total[best], "o", color=COLOURS["EMA"], markersize=9, markeredgecolor="white")
    axes.annotate(
        f"best: {half_lives[best]:.0f} steps",
        (half_lives[best], total[best]),
        (0.45, 0.27),
        textcoords="axes fraction",
        ha="right",
        arrowprops={"arrowstyle": "-", "color": QUIET, "shrinkB": 5},
    )
    axes.axhline(live, color=COLOURS["live"], linewidth=1)
    axes.annotate("live weights", (1.1, live), (0, 4), textcoords="offset points", color=COLOURS["live"])
    logarithmic(axes, "xy")
    axes.set(xlabel="half-life of the EMA (optimizer steps)", ylabel="excess loss at the end, per direction")
    axes.set_xlim(1, LAG_PROBLEM.steps)
    axes.set_ylim(0.2 * min(total.min(), variance.min()), 3 * total.max())
    ends = {
        "lag: bias²": (bias, COLOURS["BEMA"]),
        "variance": (variance, COLOURS["OUEMA"]),
        "both": (total, COLOURS["EMA"]),
    }
    label_ends(axes, {name: (half_lives[-1], values[-1], colour) for name, (values, colour) in ends.items()})
    caption = (
        f"The exact excess loss of an EMA after {LAG_PROBLEM.steps:,} steps of SGD on a quadratic, against its "
        f"half-life. Its variance falls, its lag grows; the sum is lowest at {half_lives[best]:.0f} steps, "
        f"{live / total[best]:.1f} times below the live weights, and at {half_lives[-1]:.0f} steps it is "
        f"{total[-1] / live:.0f} times above them."
    )
    numbers = {"half_life": half_lives, "bias_squared": bias, "variance": variance, "live": live}
    return Picture("lag-versus-variance", "Lag versus variance", caption, figure, numbers)


def draw_why_early() -> Picture:
    """The squared error of estimators relative to the bound, against aT."""
    process = OrnsteinUhlenbeck(A=1.0, mu=0.0, theta0=3.0, eta=0.1, Sigma=1.0)
    horizons = np.geomspace(0.2, 100.0, 80)
    estimators: dict[str, tuple[Estimator, str, str]] = {
        "last iterate": (LastIterate(), COLOURS["live"], "-"),
        "flat average": (FlatAverage(), COLOURS["EMA"], "-"),
        "corrected, α half": (PlugInMaximumLikelihood(2.0), COLOURS["BEMA"], "--"),
        "corrected, α double": (PlugInMaximumLikelihood(0.5), COLOURS["BEMA"], ":"),
        "corrected, α right": (MaximumLikelihood(), COLOURS["BEMA"], "-"),
    }
    bounds = np.array([cramer_rao(process, t) for t in horizons])
    ratios = {
        name: np.array([float(process.risk(estimator, horizon=t).total) for t in horizons]) / bounds
        for name, (estimator, _, _) in estimators.items()
    }
    figure, (axes,) = new_figure(8.5, 4.4)
    for name, (_, colour, dashes) in estimators.items():
        axes.plot(horizons, ratios[name], color=colour, linestyle=dashes, linewidth=2)
    logarithmic(axes, "xy")
    axes.set_xlim(horizons[0], horizons[-1])
    axes.set_ylim(0.8, 300)
    axes.set(xlabel="a·T: how often the start has been forgotten", ylabel="squared error, relative to the bound")
    label_ends(axes, {name: (horizons[-1], min(ratios[name][-1], 290), v[1]) for name, v in estimators.items()})
    flat, half = ratios["flat average"], ratios["corrected, α half"]
    at = {t: int(np.argmin(np.abs(horizons - t))) for t in (3.0, 100.0)}
    caption = (
        "One coordinate, three units from the minimum, exact; 1 is the lowest error that an unbiased estimator can "
        f"have. The flat average pays for its lag early ({flat[at[3.0]]:.0f} times the bound at aT = 3) and less "
        f"later ({flat[at[100.0]]:.2f} times at aT = 100). Adding α(θ_T − θ₀) with α = 1/(aT) removes the bias at "
        f"every T; with half that α {half[at[3.0]]:.0f} times the bound is left at aT = 3."
    )
    numbers = {"aT": horizons, "relative": ratios}
    return Picture("why-early", "Why correcting helps early", caption, figure, numbers)


START_RULES: dict[str, tuple[Rule, str, str]] = {
    "EMA(decay=0.999)": (EMA(decay=0.999), COLOURS["EMA"], "-"),
    "UniformAverage()": (UniformAverage(), COLOURS["UniformAverage"], "-"),
    "EMA()": (EMA(), COLOURS["EMA"], "--"),
    "OUEMA.paper(update_freq=1)": (OUEMA.paper(update_freq=1), COLOURS["OUEMA"], "-"),
    "BEMA.paper(update_freq=1)": (BEMA.paper(update_freq=1), COLOURS["BEMA"], "-"),
}


def draw_the_start(steps: int = 3000) -> Picture:
    """The weight that averages leave on θ_0, against time."""
    at = np.unique(np.geomspace(10, steps, 40).astype(int))
    weights = {
        name: np.array([weight_on_start(trajectory_weights(rule, np.arange(t + 1))) for t in at])
        for name, (rule, _, _) in START_RULES.items()
    }
    figure, (axes,) = new_figure(8.5, 4.4)
    for name, (_, colour, dashes) in START_RULES.items():
        axes.plot(at, weights[name], color=colour, linestyle=dashes, linewidth=2)
    axes.axhline(0.0, color=QUIET, linewidth=1)
    logarithmic(axes, "x")
    axes.set_xlim(at[0], at[-1])
    axes.set(xlabel="optimizer step at which the average is read", ylabel="weight on θ₀")
    label_ends(axes, {name: (at[-1], weights[name][-1], look[1]) for name, look in START_RULES.items()})
    middle = int(np.argmin(np.abs(at - 1000)))
    caption = (
        f"How much of the initial model is in the average. At step {at[middle]} an EMA with decay 0.999 is still "
        f"{weights['EMA(decay=0.999)'][middle]:.0%} initial model, the power form "
        f"{abs(weights['EMA()'][middle]):.1%}. BEMA and OUEMA subtract it: their weights are "
        f"{weights['BEMA.paper(update_freq=1)'][middle]:+.2f} and "
        f"{weights['OUEMA.paper(update_freq=1)'][middle]:+.2f}, and fade as their correction does."
    )
    return Picture("the-start", "What θ₀ does", caption, figure, {"steps": at, "weights": weights})


_FREQUENCIES = {1: ("EMA", "-"), 10: ("BEMA", (0, (6, 3))), 100: ("OUEMA", (0, (2, 2)))}
_DECAY, _HALF_LIFE = 0.999, 693


def draw_half_lives() -> Picture:
    """What the last n steps weigh, for one decay and one half-life at three update frequencies."""
    figure, panels = new_figure(11.0, 4.3, columns=2, sharey=True)
    kinds = {f"EMA(decay={_DECAY:g})": {"decay": _DECAY}, f"EMA(half_life={_HALF_LIFE})": {"half_life": _HALF_LIFE}}
    found: dict[str, dict[int, float]] = {}
    for axes, (name, width) in zip(panels, kinds.items(), strict=True):
        found[name] = {}
        for freq, (family, dashes) in _FREQUENCIES.items():
            ages, share = _share_of_recent(EMA(update_freq=freq, **width), 12 * _HALF_LIFE * freq)
            half = float(np.interp(0.5, share, ages))
            found[name][freq] = half
            axes.plot(ages, share, linestyle=dashes, color=COLOURS[family], linewidth=2, label=f"update every {freq}")
            axes.plot(half, 0.5, "o", color=COLOURS[family])
        axes.axhline(0.5, color=QUIET, linewidth=0.8, linestyle=":")
        axes.set(xscale="log", title=name, xlabel="n, in optimizer steps")
        axes.set_xlim(10, 1e6)
        axes.set_ylim(0, 1.02)
    panels[0].set_ylabel("weight on the last n steps")
    panels[1].legend(loc="lower right")
    decay, fixed = found.values()
    caption = (
        "How much of an average its last n steps make up; dots mark one half. A decay is per update: the same "
        f"{_DECAY:g} reaches {decay[1]:,.0f}, {decay[10]:,.0f} or {decay[100]:,.0f} steps back when updated every 1, "
        f"10 or 100 steps. A half-life in steps reaches {fixed[1]:,.0f}, {fixed[10]:,.0f} or {fixed[100]:,.0f}, the "
        "same up to the spacing of the updates."
    )
    return Picture("half-lives", "β in half-lives", caption, figure, {"half_of_the_average": found})


def _share_of_recent(rule: Rule, steps: int) -> tuple[FloatArray, FloatArray]:
    """Ages, from newest to oldest, and the weight on iterates at most that old."""
    updates = np.arange(0, steps + 1, rule.update_freq)
    weights = trajectory_weights(rule, updates)
    return (steps - updates[::-1]).astype(float), weights[::-1].cumsum()


def draw_the_pull(a: float = 0.1, b: float = 0.05, steps: int = 1200) -> Picture:
    """How fast the mean of the average comes in, and the variance at which it settles, with and without a pull."""
    free, pulled = PullRecursion(a, b), PullRecursion(a, b, 1.0)
    runs = {
        f"EMA, β = {b:g}": (free, COLOURS["EMA"], "-"),
        f"full pull, β = {b:g}": (pulled, COLOURS["BEMA"], "-"),
        f"EMA, β = {matched_ema(pulled).b:.4f}": (matched_ema(pulled), COLOURS["EMA"], "--"),
    }
    figure, (mean, variance) = new_figure(11.0, 4.3, columns=2, width_ratios=[1.5, 1.0])
    for colour_row, (recursion, colour, dashes) in enumerate(runs.values()):
        mean.plot(_mean_of_average(recursion, steps), color=colour, linestyle=dashes, linewidth=2)
        variance.barh(
            colour_row, recursion.ema_variance, color=colour, alpha=0.55 if dashes == "--" else 1.0, height=0.55
        )
        variance.annotate(f" {recursion.ema_variance:.3f}", (recursion.ema_variance, colour_row), va="center")
    logarithmic(mean, "y")
    mean.set_ylim(1e-3, 1.2)
    mean.set_xlim(0, steps)
    mean.set(xlabel="optimizer step", ylabel="distance of the mean from the minimum", title="the rate")
    variance.set_yticks(range(len(runs)), list(runs))
    variance.set_ylim(len(runs) - 0.5, -0.5)
    variance.set_xlim(0, 1.25 * free.ema_variance)
    variance.set(xlabel="stationary variance of the average", title="the limit")
    for name, (recursion, colour, _) in runs.items():
        path = _mean_of_average(recursion, steps)
        spot = 60 if recursion is free else 420 if recursion is pulled else 700
        mean.annotate(name, (spot, path[spot]), (8, 6), textcoords="offset points", color=colour)
    tuned = matched_ema(pulled)
    caption = (
        f"SGD on one coordinate, a = {a:g} per step. At the same β a full pull settles at "
        f"{free.ema_variance / pulled.ema_variance:.1f} times less variance and comes in "
        f"{(1 - free.contraction) / (1 - pulled.contraction):.0f} times more slowly. An EMA without pull, its β set "
        f"so that it comes in just as slowly, settles at {tuned.ema_variance / pulled.ema_variance:.2f} times the "
        "variance of the pull."
    )
    numbers = {name: {"rate": 1 - r.contraction, "variance": r.ema_variance} for name, (r, _, _) in runs.items()}
    return Picture("the-pull", "What a pull does to the limit and to the rate", caption, figure, numbers)


def _mean_of_average(recursion: PullRecursion, steps: int) -> FloatArray:
    state, path = np.ones(2), [1.0]
    for _ in range(steps):
        state = recursion.transition @ state
        path.append(float(state[1]))
    return np.array(path)


def draw_bias_of_an_inverse(seed: int = 0, chains: int = 2000, steps: int = 2000) -> Picture:
    """E[1/√v̂]·√v - 1 against β₂, with the second-order approximation."""
    betas = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
    law = GradientLaw(mean=0.01, std=1.0, microbatches=1)
    found = {beta: stationary_bias(AdamEstimator(), law, (0.0, beta), steps, chains, seed).inversion for beta in betas}
    figure, (convex, bias) = new_figure(11.0, 4.3, columns=2)
    x = np.linspace(0.12, 2.2, 200)
    low, high = 0.25, 1.75
    convex.plot(x, x**-0.5, color=COLOURS["EMA"], linewidth=2.2)
    convex.plot([low, high], [low**-0.5, high**-0.5], "o--", color=COLOURS["BEMA"], linewidth=1.2)
    middle = 0.5 * (low**-0.5 + high**-0.5)
    convex.plot(1.0, middle, "D", color=COLOURS["BEMA"], markersize=8)
    convex.plot(1.0, 1.0, "o", color=COLOURS["EMA"], markersize=8)
    convex.annotate(f"average of 1/√v̂: {middle:.2f}", (1.0, middle), (10, 4), textcoords="offset points")
    convex.annotate("1/√(average of v̂): 1.00", (1.0, 1.0), (-6, -16), textcoords="offset points", ha="right")
    convex.set(xlabel="v̂", ylabel="1/√v̂", title=f"v̂ is {low:g} or {high:g}, on average 1", ylim=(0, 3))
    expected = {beta: 0.75 * (1.0 - beta) / (1.0 + beta) for beta in betas}
    places = range(len(betas))
    bias.plot(places, [100 * v for v in expected.values()], color=QUIET, linestyle="--", label="¾(1 − β₂)/(1 + β₂)")
    bias.errorbar(
        places,
        [100 * found[beta].mean for beta in betas],
        yerr=[200 * found[beta].standard_error for beta in betas],
        fmt="D",
        color=COLOURS["BEMA"],
        capsize=4,
        label="Adam, sampled ± 2 s.e.",
    )
    bias.set_xticks(places, [f"{beta:g}" for beta in betas])
    bias.set(xlabel="β₂", ylabel="bias of 1/√v̂, %", title="for pure noise gradients")
    logarithmic(bias, "y")
    bias.legend(loc="upper right")
    worst, mild = found[betas[0]], found[betas[-1]]
    caption = (
        "Left: averaging 1/√v̂ over a noisy v̂ gives more than 1/√ of its average. Right: how much more for Adam's "
        f"v̂ when gradients are noise: {worst.mean:.1%} at β₂ = {betas[0]:g}, {mild.mean:.2%} at {betas[-1]:g}. "
        "1/√v̂ is too large by that much; the step is not, for its gradient is in v̂ too. The dashed line keeps "
        "the second-order term only; most error bars are smaller than the marks."
    )
    numbers = {f"{beta:g}": found[beta]._asdict() | {"second_order": expected[beta]} for beta in betas}
    return Picture("bias-of-an-inverse", "The bias of an inverse", caption, figure, numbers)


PRIMERS = {
    "lag-versus-variance": draw_lag_versus_variance,
    "why-early": draw_why_early,
    "the-start": draw_the_start,
    "half-lives": draw_half_lives,
    "the-pull": draw_the_pull,
    "between-iterate-and-average": draw_interpolation,
    "bias-of-an-inverse": draw_bias_of_an_inverse,
}
