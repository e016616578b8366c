"""Adaptive Gauss-Legendre quadrature of smooth, array-valued functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lagless.rules import FloatArray

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
_MAX_INTERVALS = 4096


def gauss_legendre(f: Callable[[FloatArray], FloatArray], low: float, high: float) -> FloatArray:
    """∫_low^high f with 20 nodes: exact to rounding where f is near a polynomial of degree 39.

    Args:
        f: takes x of shape (n,), returns shape (n, ...).
        low: lower limit.
        high: upper limit.
    """
    half = (high - low) / 2.0
    return half * np.tensordot(_WEIGHTS, f(low + half * (_NODES + 1.0)), axes=1)


def integrate(
    f: Callable[[FloatArray], FloatArray], low: float, high: float, *, tolerance: float = 1e-12
) -> FloatArray:
    """∫_low^high f, bisecting until no interval changes by more than ``tolerance`` times the largest entry.

    Args:
        f: takes x of shape (n,), returns shape (n, ...); smooth inside the interval.
        low: lower limit.
        high: upper limit.
        tolerance: relative to the largest entry of the integral.

    Raises:
        ArithmeticError: if 4096 intervals do not suffice.
    """
    whole = gauss_legendre(f, low, high)
    scale = float(np.abs(whole).max())
    total = np.zeros_like(whole)
    open_intervals = [(low, high, whole)]
    for _ in range(_MAX_INTERVALS):
        if not open_intervals:
            return total
        start, end, coarse = open_intervals.pop()
        middle = (start + end) / 2.0
        left, right = gauss_legendre(f, start, middle), gauss_legendre(f, middle, end)
        fine = left + right
        scale = max(scale, float(np.abs(fine).max()))
        if np.abs(fine - coarse).max() <= tolerance * scale:
            total = total + fine
        else:
            open_intervals += [(start, middle, left), (middle, end, right)]
    raise ArithmeticError(f"the integral over [{low}, {high}] did not converge to {tolerance:g}.")
