"""Estimators of μ* from a trajectory in continuous time: exact bias and covariance, and values on sampled paths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike

from lagless.rules import FloatArray
from lagless.theory.numerics import check_positive, check_tau, integrate, inverse, positive_definite
from lagless.theory.trajectories._integrals import integral_covariance, integral_cross_covariance, reach
from lagless.theory.trajectories._risk import Risk

if TYPE_CHECKING:
    from lagless.theory.trajectories._process import OrnsteinUhlenbeck


class Estimator(ABC):
    """An affine function of (θ_t), 0 ≤ t ≤ T, that estimates μ*."""

    @abstractmethod
    def bias(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        """E μ̂ - μ*, shape (d,)."""

    @abstractmethod
    def covariance(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        """Cov(μ̂), shape (d, d)."""

    @abstractmethod
    def estimate(self, process: OrnsteinUhlenbeck, times: ArrayLike, path: torch.Tensor) -> torch.Tensor:
        """μ̂ on sampled paths.

        Args:
            process: which A; neither μ* nor Σ is looked at.
            times: shape (n,), from 0 to T. Integrals over time are trapezoidal sums over these; their error in the
                variance is (a Δt)²/12 relative to the leading term.
            path: shape (..., n, d), float64, θ at those times.

        Returns:
            Shape (..., d).
        """

    def risk(self, process: OrnsteinUhlenbeck, horizon: float) -> Risk:
        """E||μ̂ - μ*||² at T = ``horizon``.

        Raises:
            ValueError: if ``horizon`` is not finite and > 0.
        """
        bias = self.bias(process, horizon)
        return Risk(float(bias @ bias), float(np.trace(self.covariance(process, horizon))))


@dataclass(frozen=True)
class LastIterate(Estimator):
    """μ̂ = θ_T: no averaging.

    Reference:
        Block and Zhang, arXiv 2508.00180, Prop. 2 (with half its stationary variance) and 5.
    """

    def bias(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        check_positive("horizon", horizon)
        return process.mean(horizon) - process.mu

    def covariance(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        check_positive("horizon", horizon)
        return process.cov(horizon, horizon)

    def estimate(self, process: OrnsteinUhlenbeck, times: ArrayLike, path: torch.Tensor) -> torch.Tensor:
        return path[..., -1, :]


@dataclass(frozen=True)
class FlatAverage(Estimator):
    """μ̂ = (1/T) ∫_0^T θ dt: the "EMA" of the paper's theory.

    Reference:
        Block and Zhang, arXiv 2508.00180, Eq. 5, Lemma 3.
    """

    def bias(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        check_positive("horizon", horizon)
        return process.basis @ (reach(process.rates, horizon) * process.start) / horizon

    def covariance(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        check_positive("horizon", horizon)
        return process.basis @ integral_covariance(process, horizon) @ process.basis.T / horizon**2

    def estimate(self, process: OrnsteinUhlenbeck, times: ArrayLike, path: torch.Tensor) -> torch.Tensor:
        return _time_average(np.asarray(times, dtype=np.float64), path)


@dataclass(frozen=True)
class MaximumLikelihood(Estimator):
    """μ̂ = A⁻¹(θ_T - θ_0)/T + (1/T) ∫_0^T θ dt = μ* + √η A⁻¹Σ W_T/T: unbiased, and optimal at every T.

    Reference:
        Block and Zhang, arXiv 2508.00180, Eq. 8, Theorems 2 and 4, Cor. 1.
    """

    def bias(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        check_positive("horizon", horizon)
        return np.zeros(process.dimension)

    def covariance(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        check_positive("horizon", horizon)
        root = np.linalg.solve(process.A, process.Sigma)
        return process.eta * root @ root.T / horizon

    def estimate(self, process: OrnsteinUhlenbeck, times: ArrayLike, path: torch.Tensor) -> torch.Tensor:
        return _average_plus_displacement(inverse(process.A), times, path)


@dataclass(frozen=True, eq=False)
class PlugInMaximumLikelihood(Estimator):
    """The maximum likelihood estimator with a guess Ã instead of A: μ̂ = Ã⁻¹(θ_T - θ_0)/T + (1/T) ∫_0^T θ dt.

    Args:
        guess: Ã, shape (d, d), symmetric positive definite, need not commute with A; a number α stands for αI.

    Raises:
        ValueError: when used, if Ã does not fit the process or is not symmetric positive definite.

    Reference:
        Block and Zhang, arXiv 2508.00180, Theorem 5.
    """

    guess: ArrayLike

    def inverse_guess(self, process: OrnsteinUhlenbeck) -> FloatArray:
        """Ã⁻¹, shape (d, d)."""
        return inverse(positive_definite("guess", self.guess, process.dimension))

    def bias(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        check_positive("horizon", horizon)
        travelled = process.mean(horizon) - process.theta0
        return (self.inverse_guess(process) - inverse(process.A)) @ travelled / horizon

    def covariance(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        check_positive("horizon", horizon)
        guess = process.basis.T @ self.inverse_guess(process) @ process.basis
        mixed = guess @ integral_cross_covariance(process, horizon)
        ends = guess @ process.innovation(horizon) @ guess
        total = ends + mixed + mixed.T + integral_covariance(process, horizon)
        return process.basis @ total @ process.basis.T / horizon**2

    def estimate(self, process: OrnsteinUhlenbeck, times: ArrayLike, path: torch.Tensor) -> torch.Tensor:
        return _average_plus_displacement(self.inverse_guess(process), times, path)


@dataclass(frozen=True)
class OUFlatAverage(Estimator):
    """The flat average over [τ, T] of iterates without the memory of θ_0 ("OUEMA").

        θ̄_t = (I - e^{-At})⁻¹ (θ_t - e^{-At} θ_0)        μ̂ = 1/(T-τ) ∫_τ^T θ̄ dt

    Unbiased. The noise entering at u ≤ T reaches μ̂ through e^{Au} A⁻¹ log[(I - e^{-AT})(I - e^{-A max(u,τ)})⁻¹]/(T-τ);
    its square is integrated by quadrature to a relative 1e-12.

    Args:
        tau: τ in (0, T).

    Raises:
        ValueError: if τ is not in (0, T); on a sampled path, if τ is not one of its times.

    Reference:
        Block and Zhang, arXiv 2508.00180, Theorem 1, Prop. 9 and 10.
    """

    tau: float

    def __post_init__(self) -> None:
        check_positive("tau", self.tau)

    def bias(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        self._check(horizon)
        return np.zeros(process.dimension)

    def covariance(self, process: OrnsteinUhlenbeck, horizon: float) -> FloatArray:
        self._check(horizon)
        rates, tau = process.rates, self.tau

        def gain(time: FloatArray) -> FloatArray:
            """e^{au} log[(1 - e^{-aT})/(1 - e^{-au})], shape (n, d), for u in [τ, T]."""
            u = time[:, None]
            step = np.expm1(-rates * (horizon - u)) / np.expm1(-rates * u)
            return step * _log1p_ratio(np.exp(-rates * u) * step)

        def outer(time: FloatArray) -> FloatArray:
            values = gain(time)
            return values[:, :, None] * values[:, None, :]

        at_tau = gain(np.array([tau]))[0]
        before = np.outer(at_tau, at_tau) * reach(rates[:, None] + rates, tau)
        kernel = (before + integrate(outer, tau, horizon)) / np.outer(rates, rates)
        total = process.eta * process.noise * kernel / (horizon - tau) ** 2
        return process.basis @ total @ process.basis.T

    def estimate(self, process: OrnsteinUhlenbeck, times: ArrayLike, path: torch.Tensor) -> torch.Tensor:
        moments = np.asarray(times, dtype=np.float64)
        self._check(moments[-1])
        first = int(np.argmin(np.abs(moments - self.tau)))
        if abs(moments[first] - self.tau) > 1e-9 * self.tau:
            raise ValueError(f"tau={self.tau} is not one of the times of the path; add it.")
        return _time_average(moments[first:], debiased(process, moments[first:], path[..., first:, :]))

    def _check(self, horizon: float) -> None:
        check_tau(self.tau, horizon)


def debiased(process: OrnsteinUhlenbeck, times: ArrayLike, path: torch.Tensor) -> torch.Tensor:
    """θ̄_t = (I - e^{-At})⁻¹(θ_t - e^{-At}θ_0), of mean μ* at every t > 0: iterates without the memory of θ_0.

    Args:
        process: which A and θ_0.
        times: shape (n,), > 0.
        path: shape (..., n, d), float64, θ at those times.

    Returns:
        Shape (..., n, d).

    Reference:
        Block and Zhang, arXiv 2508.00180, Prop. 9. (Theorem 1 prints e^{-AT} for e^{-At}.)
    """
    moments = np.asarray(times, dtype=np.float64)
    basis = torch.as_tensor(process.basis, dtype=torch.float64).to(path)
    start = torch.as_tensor(process.theta0, dtype=torch.float64).to(path)
    gained = torch.as_tensor(-np.expm1(-np.multiply.outer(moments, process.rates)), dtype=torch.float64).to(path)
    # θ_0 + (I - e^{-At})⁻¹ (θ_t - θ_0), the same thing.
    return start + (((path - start) @ basis) / gained) @ basis.T


def _log1p_ratio(x: FloatArray) -> FloatArray:
    """log(1 + x)/x for x ≥ 0, 1 at 0."""
    safe = np.where(x > 0.0, x, 1.0)
    return np.where(x > 0.0, np.log1p(safe) / safe, 1.0)


def _time_average(times: FloatArray, path: torch.Tensor) -> torch.Tensor:
    """The trapezoidal average over ``times``: (..., n, d) → (..., d)."""
    gaps = np.diff(times)
    weights = (np.append(gaps, 0.0) + np.insert(gaps, 0, 0.0)) / (2.0 * (times[-1] - times[0]))
    return torch.einsum("n,...nd->...d", torch.as_tensor(weights, dtype=torch.float64).to(path), path)


def _average_plus_displacement(per_distance: FloatArray, times: ArrayLike, path: torch.Tensor) -> torch.Tensor:
    moments = np.asarray(times, dtype=np.float64)
    travelled = (path[..., -1, :] - path[..., 0, :]) @ torch.as_tensor(per_distance, dtype=torch.float64).to(path)
    return _time_average(moments, path) + travelled / float(moments[-1])
