"""Second moments of ∫θ dt, in closed form in A's eigenbasis and without cancellation at small T.

With F_a(x) = (1 - e^{-ax})/a, the noise that enters at time T - x reaches θ_T through e^{-Ax} and ∫θ through F_A(x):

    Cov(∫θ)      = ∫_0^T F_A(x) ηΣ² F_A(x) dx
    Cov(θ_T, ∫θ) = ∫_0^T e^{-Ax} ηΣ² F_A(x) dx
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lagless.rules import FloatArray
from lagless.theory.numerics import gauss_legendre

if TYPE_CHECKING:
    from lagless.theory.trajectories._process import OrnsteinUhlenbeck


def reach(rates: FloatArray, duration: float | FloatArray) -> FloatArray:
    """F_a(x) = (1 - e^{-ax})/a, the integral of e^{-at} up to ``duration``."""
    return -np.expm1(-rates * duration) / rates


def integral_covariance(process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
    """Cov(∫_0^T θ dt), shape (d, d), in ``process.basis``.

    Reference:
        Block and Zhang, arXiv 2508.00180, Lemma 3, which bounds it and gives it for Σ = σI.
    """
    first, second = np.broadcast_arrays(process.rates[:, None], process.rates)
    return process.eta * process.noise * _reach_times_reach(first, second, horizon)


def integral_cross_covariance(process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
    """Cov(θ_T, ∫_0^T θ dt), shape (d, d), rows for θ_T, in ``process.basis``.

    Reference:
        Block and Zhang, arXiv 2508.00180, Lemma 4, which bounds it and gives it for Σ = σI.
    """
    first, second = np.broadcast_arrays(process.rates[:, None], process.rates)
    return process.eta * process.noise * _decay_times_reach(first, second, horizon)


def _decay_times_reach(a: FloatArray, b: FloatArray, horizon: float) -> FloatArray:
    """∫_0^T e^{-ax} F_b(x) dx: by the form that divides by the larger rate, by quadrature where both are small."""
    both = reach(a + b, horizon)
    exact = np.where(
        b >= a,
        (reach(a, horizon) - both) / b,
        (both - np.exp(-a * horizon) * reach(b, horizon)) / a,
    )
    small = gauss_legendre(lambda x: np.exp(-np.multiply.outer(x, a)) * _reach_at(x, b), 0.0, horizon)
    return np.where(np.maximum(a, b) * horizon < 1.0, small, exact)


def _reach_times_reach(a: FloatArray, b: FloatArray, horizon: float) -> FloatArray:
    """∫_0^T F_a(x) F_b(x) dx."""
    high, low = np.maximum(a, b), np.minimum(a, b)
    slow = gauss_legendre(lambda x: _reach_at(x, low), 0.0, horizon)
    area = np.where(low * horizon < 1.0, slow, (horizon - reach(low, horizon)) / low)
    exact = (area - _decay_times_reach(high, low, horizon)) / high
    small = gauss_legendre(lambda x: _reach_at(x, a) * _reach_at(x, b), 0.0, horizon)
    return np.where(high * horizon < 1.0, small, exact)


def _reach_at(x: FloatArray, rates: FloatArray) -> FloatArray:
    """F_a at many x: shape (n, ...)."""
    return reach(rates, x.reshape(-1, *[1] * rates.ndim))
