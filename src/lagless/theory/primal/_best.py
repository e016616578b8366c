"""The best constant gains of primal averaging for given curvature and noise, with and without interpolation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lagless._validation import require_integer
from lagless.rules import EMA, FloatArray
from lagless.theory.primal._rules import coordinates

_POINTS, _ZOOMS = 13, 14
_SLOWEST = 1e-3  # smallest gain, times the number of steps; and the smallest learning rate of its kind


@dataclass(frozen=True)
class BestPrimalAveraging:
    """The lowest exact risk ½Σh E x² of the average at the last step, and where it lies.

    Attributes:
        lr: η.
        rule: the EMA of z.
        interpolation: m.
        risk: at these.
        plain_lr: η of the best with m = 0, SGD with an EMA beside it.
        plain_rule: its EMA.
        plain_risk: at these.
    """

    lr: float
    rule: EMA
    interpolation: float
    risk: float
    plain_lr: float
    plain_rule: EMA
    plain_risk: float

    @property
    def improvement(self) -> float:
        """Return the risk without interpolation over that with it, both at their best; at least 1."""
        return self.plain_risk / self.risk


def best_primal_averaging(
    curvatures: ArrayLike, noise: ArrayLike, steps: int, *, distance: ArrayLike = 1.0
) -> BestPrimalAveraging:
    """Return the learning rate, gain and interpolation with the lowest risk of the returned average after ``steps``.

    Gradients are h·y + ς·ξ with y = (1 - m)z + m·x, x an EMA of z with decay 1 - b, all of them constant over the run;
    z_0 = x_0 = ``distance``. Mean and covariance of every coordinate follow from powers of a 2×2 matrix. The search
    narrows a grid over (η, b, 1 - m), in logarithms. A pull is left out: it is another learning rate and gain, see
    :func:`lagless.theory.hidden_iterate`.

    Args:
        curvatures: h > 0, shape (d,).
        noise: ς ≥ 0, a number or shape (d,).
        steps: T ≥ 1.
        distance: of the start from the minimum, a number or shape (d,).

    Raises:
        ValueError: if an argument is out of range.

    >>> best = best_primal_averaging([0.1, 1.0], noise=1.0, steps=500)
    >>> best.improvement >= 1.0
    True
    """
    require_integer("steps", steps, minimum=1)
    h, spread, start = coordinates(curvatures, noise, distance)
    top = float(h.max())
    low = np.log([_SLOWEST / (steps * top), min(1.0, _SLOWEST), 1e-6])
    low[1] = np.log(min(1.0, 1.0 / (10.0 * steps)))
    high = np.log([1e3 / top, 1.0, 1.0])

    def search(low: FloatArray, high: FloatArray) -> tuple[FloatArray, float]:
        centre, half, best = 0.5 * (low + high), 0.5 * (high - low), np.inf
        for _ in range(_ZOOMS):
            axes = [
                np.unique(np.clip(np.linspace(c - r, c + r, _POINTS), lo, hi))
                for c, r, lo, hi in zip(centre, half, low, high, strict=True)
            ]
            grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
            risks = _risks(np.exp(grid), h, spread, start, steps)
            place = int(np.argmin(risks))
            if risks[place] < best:
                centre, best = grid[place], float(risks[place])
            half = half * 0.5
        return np.exp(centre), best

    (lr, b, rest), risk = search(low, high)
    (plain_lr, plain_b, _), plain_risk = search(np.array([*low[:2], 0.0]), high)
    if plain_risk <= risk:
        (lr, b, rest), risk = (plain_lr, plain_b, 1.0), plain_risk
    return BestPrimalAveraging(
        float(lr),
        EMA(decay=1.0 - float(b)),
        1.0 - float(rest),
        risk,
        float(plain_lr),
        EMA(decay=1.0 - float(plain_b)),
        plain_risk,
    )


def _risks(settings: FloatArray, h: FloatArray, spread: FloatArray, start: FloatArray, steps: int) -> FloatArray:
    """½Σh E x_T² for every (η, b, 1 - m), shape (settings,); infinite where it overflows."""
    lr, b, rest = (column[:, None] for column in settings.T)
    a, keep = lr * h, 1.0 - b
    z, away = 1.0 - a * rest, -a * (1.0 - rest)
    one = (z, away + 0.0 * b, b * z, keep + b * away)  # X, row by row
    q = (lr * spread) ** 2
    kick = (q + 0.0 * b, b * q, b * b * q)  # of (z, z), (z, x) and (x, x)
    with np.errstate(over="ignore", invalid="ignore"):
        power, covariance = one, kick
        for bit in bin(steps)[3:]:
            covariance = tuple(map(np.add, covariance, _turned(power, covariance)))
            power = _product(power, power)
            if bit == "1":
                covariance = tuple(map(np.add, kick, _turned(one, covariance)))
                power = _product(one, power)
        mean = (power[2] + power[3]) * start
        risks = 0.5 * ((mean * mean + covariance[2]) * h).sum(axis=1)
    return np.where(np.isfinite(risks), risks, np.inf)


def _product(left: tuple[FloatArray, ...], right: tuple[FloatArray, ...]) -> tuple[FloatArray, ...]:
    (a, b, c, d), (e, f, g, h) = left, right
    return a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h


def _turned(matrix: tuple[FloatArray, ...], covariance: tuple[FloatArray, ...]) -> tuple[FloatArray, ...]:
    """M C Mᵀ of a symmetric C, as its elements (0, 0), (0, 1) and (1, 1)."""
    (a, b, c, d), (s, t, u) = matrix, covariance
    return (
        a * a * s + 2.0 * a * b * t + b * b * u,
        a * c * s + (a * d + b * c) * t + b * d * u,
        c * c * s + 2.0 * c * d * t + d * d * u,
    )
