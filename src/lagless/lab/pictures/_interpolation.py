"""The figure of the primer on gradients between the iterate and its average."""

from __future__ import annotations

import numpy as np

from lagless.lab.pictures._drawing import COLOURS, QUIET, Picture, logarithmic, new_figure
from lagless.rules import FloatArray
from lagless.theory import PrimalRecursion

SPECTRUM = np.array([1.0, 10.0, 100.0])
_POINTS = 90  # of the grid in each of learning rate, gain and 1 - m


def draw_interpolation(a: float = 0.1) -> Picture:
    """Risk against rate at one learning rate, and with the learning rate free."""
    figure, (fixed, free) = new_figure(11.0, 4.3, columns=2)
    rates = np.geomspace(1e-3, 0.9 * a, 40)
    plain = np.array([PrimalRecursion(a, r).average_variance for r in rates])
    double = np.array([_double_root(a, r).average_variance for r in rates])
    fixed.plot(rates, plain, color=COLOURS["EMA"], linewidth=2)
    fixed.plot(rates, double, color=COLOURS["BEMA"], linewidth=2, linestyle="--")
    fixed.annotate("m = 0", (rates[12], plain[12]), (-8, 6), textcoords="offset points", ha="right")
    fixed.annotate("best m", (rates[18], double[18]), (8, -14), textcoords="offset points", color=COLOURS["BEMA"])
    logarithmic(fixed, "xy")
    fixed.set(xlabel="rate 1 − ρ", ylabel="variance of the average", title=f"one curvature, a = {a:g} for both")

    fastest = 2.0 / (SPECTRUM[-1] / SPECTRUM[0] + 1.0)
    rates_free = np.geomspace(1e-3, 0.15, 50)
    risk_plain = np.array([_plain_risk(r) if r <= fastest else np.nan for r in rates_free])
    best = np.fmin(_envelope(rates_free), risk_plain)
    free.plot(rates_free, best, color=COLOURS["BEMA"], linewidth=2, linestyle="--")
    free.plot(rates_free, risk_plain, color=COLOURS["EMA"], linewidth=2)
    free.axvline(fastest, color=QUIET, linewidth=0.8, linestyle=":")
    free.annotate("no plain average\nis faster", (fastest, best[0]), (6, 0), textcoords="offset points", color=QUIET)
    free.annotate("best is m = 0", (rates_free[20], best[20]), (-8, 6), textcoords="offset points", ha="right")
    free.annotate(
        "best m", (rates_free[44], best[44]), (-8, 6), textcoords="offset points", ha="right", color=COLOURS["BEMA"]
    )
    logarithmic(free, "xy")
    free.set(xlabel="slowest rate 1 − ρ", ylabel="loss of the average", title="curvatures 1, 10, 100; η free")
    at = int(np.argmin(np.abs(rates - a / 10.0)))
    last = int(np.flatnonzero(np.isfinite(best))[-1])
    caption = (
        f"Left: at one learning rate, interpolation settles at {double[at] / plain[at]:.2f} of the variance of a plain "
        f"average with the same rate ({rates[at]:.3f}). Right: with the learning rate free, the best setting at every "
        f"rate up to 2/(κ + 1) = {fastest:.4f} is a plain average; interpolation alone reaches rates beyond, "
        f"up to {rates_free[last] / fastest:.0f} times as fast here, at the price of more noise."
    )
    numbers = {
        "rate": rates,
        "plain": plain,
        "interpolated": double,
        "rate_free": rates_free,
        "plain_free": risk_plain,
        "best_free": best,
    }
    return Picture("between-iterate-and-average", "Gradients at the average", caption, figure, numbers)


def _double_root(a: float, rate: float) -> PrimalRecursion:
    b = rate * rate / a
    return PrimalRecursion(a, b, (a + b - 2.0 * rate) / (a * (1.0 - b)))


def _plain_risk(rate: float) -> float:
    """½Σh Var x of the plain average whose slowest rates are both ``rate``, for gradient noise 1."""
    eta = rate / SPECTRUM[0]
    return 0.5 * sum(float(h) * PrimalRecursion(eta * h, rate, sigma=eta).average_variance for h in SPECTRUM)


def _envelope(rates: FloatArray) -> FloatArray:
    """The lowest risk of a grid of settings among those at least as fast."""
    eta, b, rest = (
        axis.ravel()[:, None]
        for axis in np.meshgrid(
            np.geomspace(0.01, 0.5, _POINTS), np.geomspace(0.01, 0.6, _POINTS), np.geomspace(1e-3, 1.0, _POINTS)
        )
    )
    a = eta * SPECTRUM
    delta, tau = (1.0 - b) * (1.0 - a * rest), 2.0 - b - a * (rest + b * (1.0 - rest))
    root = np.sqrt((tau * tau - 4.0 * delta).astype(complex))
    rate = 1.0 - np.maximum(abs(tau + root), abs(tau - root)).max(axis=1) / 2.0
    far = 4.0 - 2.0 * b - a * (rest * (2.0 - b) + b * (1.0 - rest))
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = eta**2 * b * (1.0 + delta) / (a * (b + a * rest * (1.0 - b)) * far)
    risk = 0.5 * (variance * SPECTRUM).sum(axis=1)
    stable = rate > 0.0
    return np.array([np.min(risk[stable & (rate >= r)], initial=np.inf) for r in rates])
