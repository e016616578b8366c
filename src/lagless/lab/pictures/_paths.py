"""One path in two dimensions, as in Fig. 1(a) of arXiv 2508.00180."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from lagless.lab.pictures._drawing import COLOURS, Picture, new_figure
from lagless.rules import BEMA, EMA, FloatArray, Rule
from lagless.theory import OrnsteinUhlenbeck, averages_along

_CURVATURES = (1.0, 2.0)
_RULES: dict[str, Rule] = {
    "iterate": EMA(ema_power=0.0),
    "EMA": EMA(ema_power=1.0),
    "BEMA": BEMA.paper(ema_power=1.0, bias_power=0.25, update_freq=1),
}


def draw_path(seed: int = 0, steps: int = 400) -> Picture:
    """The iterate, its EMA and its BEMA on the contours of the loss."""
    process = OrnsteinUhlenbeck(np.diag(_CURVATURES), mu=0.0, theta0=np.array([4.0, 3.0]), eta=0.01, Sigma=10.0)
    path = process.sample(1, process.eta * np.arange(steps + 1), seed=seed)[0]
    paths = {name: average.numpy() for name, average in averages_along(_RULES, path, steps).items()}
    expected = {name: float(risk.total) ** 0.5 for name, risk in process.risks(_RULES, steps=steps).items()}
    figure, (plane, time) = new_figure(11, 4.8, columns=2)
    iterate = paths["iterate"]
    _contours(plane, iterate)
    plane.plot(*iterate.T, color="#a6a6a6", linewidth=0.8, zorder=2)
    for name in ("EMA", "BEMA"):
        plane.plot(*paths[name].T, color=COLOURS[name], linewidth=2.2, zorder=3)
        plane.plot(*paths[name][-1], "o", color=COLOURS[name], markeredgecolor="white", markersize=9, zorder=5)
    plane.plot(*iterate[-1], "o", color=COLOURS["live"], markeredgecolor="white", markersize=9, zorder=5)
    plane.plot(*iterate[0], "s", color="black", markersize=7, zorder=5)
    plane.annotate("start", tuple(iterate[0]), (-8, 6), textcoords="offset points", ha="right", fontweight="bold")
    plane.plot(0.0, 0.0, "+", color="black", markersize=13, markeredgewidth=2, zorder=6)
    plane.set(xlabel="first coordinate", ylabel="second coordinate", title="the path, on contours of the loss")
    plane.set_aspect("equal")

    distance = {name: np.linalg.norm(path, axis=1) for name, path in paths.items()}
    for name, label in (("iterate", "iterate"), ("EMA", "EMA"), ("BEMA", "BEMA")):
        colour = COLOURS.get(name, "#a6a6a6")
        time.plot(distance[name], color=colour, linewidth=1.0 if name == "iterate" else 2.2, label=label)
    time.set(xlabel="optimizer step", ylabel="distance from the minimum", title="how far from the minimum")
    time.set_ylim(0, None)
    time.set_xlim(0, steps)
    time.legend(labelcolor="linecolor", loc="upper right")
    second = slice(steps // 2, None)
    means = {name: float(values[second].mean()) for name, values in distance.items()}
    return Picture(
        "figure-1a",
        "Figure 1(a): one path",
        _caption(means, expected, seed, steps),
        figure,
        {"mean_distance_second_half": means, "expected_rms_at_end": expected, "paths": paths},
    )


def _contours(axes: Axes, path: FloatArray) -> None:
    low, high = path.min(axis=0) - 0.4, path.max(axis=0) + 0.4
    x, y = np.meshgrid(np.linspace(low[0], high[0], 120), np.linspace(low[1], high[1], 120))
    loss = 0.5 * (_CURVATURES[0] * x**2 + _CURVATURES[1] * y**2)
    levels = loss.max() * np.linspace(0.1, 1.0, 8) ** 2
    axes.contour(x, y, loss, levels=levels, colors="#cfd6dd", linewidths=0.9, zorder=1)


def _caption(means: dict[str, float], expected: dict[str, float], seed: int, steps: int) -> str:
    return (
        "SGD with large noise, from the start (square) towards the minimum (cross), and two averages of its "
        "iterates; dots mark where each ends. Left: the iterate (grey) comes near soon and keeps jumping, the EMA "
        "(blue) is smooth and late, BEMA (orange) is smooth and not as late. Right: the same against time. Mean "
        f"distance from the minimum over the last {steps // 2} of {steps} steps: {_ranked(means)}. That is one path "
        f"(seed {seed}); over all paths the root mean square distance at the end is, exactly, {_ranked(expected)}."
    )


def _ranked(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.2f}" for name in sorted(values, key=values.__getitem__))
