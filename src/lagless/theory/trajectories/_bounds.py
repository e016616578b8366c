"""Bounds of the paper on E||μ̂ - μ*||², as functions of a process and a horizon T.

All from Block and Zhang, *EMA Without the Lag*, arXiv 2508.00180; each function names its statement. Exact risks are in
``Estimator.risk``; what the paper prints differently is in ``slips``. A horizon that is not finite and > 0 raises a
ValueError.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lagless.rules import FloatArray
from lagless.theory.numerics import check_positive, check_tau, commute, inverse, op_norm, positive_definite
from lagless.theory.trajectories._process import OrnsteinUhlenbeck


def cramer_rao(process: OrnsteinUhlenbeck, horizon: float, *, lipschitz: float = 0.0) -> float:
    """A lower bound for any estimator whose bias, as a function of μ*, is L-Lipschitz.

        E||μ̂ - μ*||² ≥ (1 - L)² η Tr(A⁻¹Σ²A⁻¹)/T

    Args:
        process: the process.
        horizon: T > 0.
        lipschitz: L in [0, 1); 0 for unbiased estimators.

    Raises:
        ValueError: if T is not finite and > 0, or L not in [0, 1).

    Reference:
        Eq. 3, Prop. 1 (Σ = σI), 6 (unbiased) and 7 (contraction).
    """
    check_positive("horizon", horizon)
    if not 0.0 <= lipschitz < 1.0:
        raise ValueError(f"lipschitz={lipschitz!r}; the bound holds for biases with a constant in [0, 1).")
    root = np.linalg.solve(process.A, process.Sigma)
    return float((1.0 - lipschitz) ** 2 * process.eta * (root**2).sum() / horizon)


def fisher_information(process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
    """T A Σ⁻² A/η, shape (d, d): minus the expected Hessian of :func:`log_likelihood` in μ.

    Reference:
        Proof of Prop. 6.
    """
    check_positive("horizon", horizon)
    root = np.linalg.solve(process.Sigma, process.A)
    return horizon * root.T @ root / process.eta


def last_iterate_upper_bound(process: OrnsteinUhlenbeck, horizon: float) -> float:
    """||e^{-AT}(θ_0 - μ*)||² + η ||Σ||² Tr(A⁻¹)/2 ≥ E||θ_T - μ*||².

    Half the printed variance term, which is a bound all the more.

    Reference:
        Prop. 5 and Lemma 2.
    """
    check_positive("horizon", horizon)
    bias = process.decay(horizon) * process.start
    return float(bias @ bias + _noise(process) * (1.0 / process.rates).sum() / 2.0)


def flat_average_upper_bound(process: OrnsteinUhlenbeck, horizon: float) -> float:
    """η ||Σ||² Tr(A⁻²)/T + ||A⁻¹||² ||μ* - θ_0||²/T² ≥ the risk of the flat average.

    Reference:
        Eq. 6, Prop. 3 (Σ = σI) and Cor. 2.
    """
    check_positive("horizon", horizon)
    distance = process.start @ process.start
    return float(_noise(process) * _trace(process) / horizon + distance / (process.rates[0] * horizon) ** 2)


def flat_average_lower_bound(process: OrnsteinUhlenbeck, horizon: float) -> float:
    """(1 - λ_max(A) T/2)² ||μ* - θ_0||² ≤ the risk of the flat average, for λ_max(A) T ≤ 2; 0 beyond.

    This is the constant of the proof. The statement's (1 - c)² with λ_max(A) T ≤ c/2 is weaker.

    Reference:
        Prop. 3 and 8.
    """
    check_positive("horizon", horizon)
    factor = max(0.0, 1.0 - process.rates[-1] * horizon / 2.0)
    return float(factor**2 * (process.start @ process.start))


def ou_flat_average_upper_bound(process: OrnsteinUhlenbeck, horizon: float, tau: float) -> float:
    """η ||Σ||² Tr(A⁻²) / (T [(1 - e^{-λ_min(A) τ})(1 - τ/T)]²) ≥ the risk of :class:`OUFlatAverage`.

    Reference:
        Eq. 7, Theorem 1 (Σ = σI) and Prop. 10.
    """
    check_tau(tau, horizon)
    loss = -np.expm1(-process.rates[0] * tau) * (1.0 - tau / horizon)
    return float(_noise(process) * _trace(process) / (horizon * loss**2))


def plug_in_upper_bound(process: OrnsteinUhlenbeck, horizon: float, guess: ArrayLike) -> float:
    """The bound for :class:`PlugInMaximumLikelihood` with Ã, for any A, Σ and Ã.

        η||Σ||² [Tr(A⁻²)/T + ||Ã⁻¹||² Tr(A⁻¹)/T² + ||Ã⁻¹|| Tr(A⁻²)/T²] + ||Ã⁻¹ - A⁻¹||² ||μ* - θ_0||²/T²

    Reference:
        Theorem 5, first part.
    """
    by_guess, bias = _guess(process, horizon, guess)
    size = op_norm(by_guess)
    extra = (size**2 * (1.0 / process.rates).sum() + size * _trace(process)) / horizon**2
    return float(_noise(process) * (_trace(process) / horizon + extra) + bias)


def commuting_plug_in_upper_bound(process: OrnsteinUhlenbeck, horizon: float, guess: ArrayLike) -> float:
    """The sharper bound for Σ = σI and Ã that commutes with A.

        ησ² [Tr(A⁻²)/T + Tr(Ã⁻²A⁻¹)/T² + Tr(Ã⁻¹A⁻²)/T²] + ||Ã⁻¹ - A⁻¹||² ||μ* - θ_0||²/T²

    Raises:
        ValueError: if Σ is not σI or Ã does not commute with A.

    Reference:
        Eq. 13, Theorem 5, second part.
    """
    by_guess, bias = _guess(process, horizon, guess)
    sigma = isotropic(process)
    if sigma is None or not commute(positive_definite("guess", guess, process.dimension), process.A):
        raise ValueError("this bound needs Sigma = sigma I and a guess that commutes with A; use plug_in_upper_bound.")
    own = inverse(process.A)
    extra = (np.trace(by_guess @ by_guess @ own) + np.trace(by_guess @ own @ own)) / horizon**2
    return float(process.eta * sigma**2 * (_trace(process) / horizon + extra) + bias)


def isotropic(process: OrnsteinUhlenbeck) -> float | None:
    """σ if Σ = σI, else None."""
    sigma = float(np.trace(process.Sigma)) / process.dimension
    return (
        sigma if np.allclose(process.Sigma, sigma * np.eye(process.dimension), rtol=0.0, atol=1e-12 * sigma) else None
    )


def _noise(process: OrnsteinUhlenbeck) -> float:
    """η ||Σ||²."""
    return process.eta * op_norm(process.Sigma) ** 2


def _trace(process: OrnsteinUhlenbeck) -> float:
    """Tr(A⁻²)."""
    return float((process.rates**-2).sum())


def _guess(process: OrnsteinUhlenbeck, horizon: float, guess: ArrayLike) -> tuple[FloatArray, float]:
    """Ã⁻¹ and the bias term of Theorem 5."""
    check_positive("horizon", horizon)
    by_guess = inverse(positive_definite("guess", guess, process.dimension))
    gap = op_norm(by_guess - inverse(process.A)) / horizon
    return by_guess, float(gap**2 * (process.start @ process.start))
