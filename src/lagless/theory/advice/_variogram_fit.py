"""Least squares of a spectrum of rates, evenly spread in log r, to a variogram."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lagless.rules import FloatArray
from lagless.theory.numerics import Estimate

FASTEST = 0.99  # the largest rate that is fitted
_WIDEST = 20.0  # of log r_max/r_min
_STEP = 1e-5
_ITERATIONS = 500


class Fit(NamedTuple):
    """A fitted spectrum: rates and the standard deviation of one step's noise, with standard errors.

    Attributes:
        rate_min: r_min.
        rate_max: r_max.
        step_noise: s.
        misfit: root mean square of the relative residuals.
        sampling_error: root mean square of the relative standard errors of the variogram itself.
        bounded: whether the fit ends at the largest rate that is tried.
        widest: r_max/r_min, at most, if a single rate was fitted: at the upper limit of the width, two standard
            errors up. Otherwise that of the fit.
        fastest: r_max there.
    """

    rate_min: Estimate
    rate_max: Estimate
    step_noise: Estimate
    misfit: float
    sampling_error: float
    bounded: bool
    widest: float
    fastest: float


def fit_spectrum(lags: FloatArray, observed: FloatArray, coordinates: int) -> Fit:
    """Fit r_min, r_max and s to a variogram, D(l) = mean over the rates r of s²/(r(2 - r))·(1 - (1 - r)^l).

    Least squares weighted by the inverse variance of each lag; errors by the delta method from the covariance of the
    lags between groups. Parameters are the middle of log r, the square of its width, in which D is smooth at 0, and
    log s.

    Args:
        lags: shape (K,), in optimizer steps.
        observed: shape (groups, K).
        coordinates: how many rates, from r_min to r_max, make up the spectrum.
    """
    nodes = np.linspace(-1.0, 1.0, coordinates) if coordinates > 1 else np.zeros(1)
    mean = observed.mean(axis=0)
    covariance = np.atleast_2d(np.cov(observed, rowvar=False)) / len(observed)
    scale = 1.0 / np.sqrt(np.maximum(np.diag(covariance), 1e-30 * mean**2))
    data = _Data(lags, mean, scale, nodes)
    point = _descend(_start(data), data, free=[0, 1, 2])
    errors = _errors(point, data, covariance, free=[0, 1, 2])
    bounded = _log_fastest(point) > np.log(FASTEST) - 1e-6
    widest = point
    if point[1] <= 2.0 * np.sqrt(errors[1, 1]):
        widest = _upper_limit(point, errors, data)
        point = _descend(np.array([point[0], 0.0, point[2]]), data, free=[0, 2])
        errors = _errors(point, data, covariance, free=[0, 2])
    width = np.sqrt(point[1])
    towards = np.array([0.0, 0.25 / width if width > 0.0 else 0.0, 0.0])  # d(width/2)/d(width²)
    ends = []
    for sign in (-1.0, 1.0):
        rate = float(np.exp(point[0] + 0.5 * sign * width))
        gradient = np.array([1.0, 0.0, 0.0]) + sign * towards
        ends.append(Estimate(rate, rate * float(np.sqrt(gradient @ errors @ gradient))))
    noise = float(np.exp(point[2]))
    fitted = data.variogram(point)
    return Fit(
        ends[0],
        ends[1],
        Estimate(noise, noise * float(np.sqrt(errors[2, 2]))),
        misfit=float(np.sqrt(np.mean(((mean - fitted) / fitted) ** 2))),
        sampling_error=float(np.sqrt(np.mean(np.diag(covariance) / fitted**2))),
        bounded=bool(bounded),
        widest=float(np.exp(np.sqrt(widest[1]))),
        fastest=float(np.exp(_log_fastest(widest))),
    )


def mean_variance(fit: Fit, count: int, spacing: int, coordinates: int) -> float:
    """Var of the mean of ``count`` stationary iterates ``spacing`` steps apart, averaged over directions."""
    rates = np.geomspace(fit.rate_min.mean, fit.rate_max.mean, coordinates)
    gaps = np.arange(count)
    multiplicity = np.where(gaps == 0, count, 2.0 * (count - gaps))
    powers = np.exp(np.multiply.outer(np.log1p(-rates), gaps * spacing))
    variances = fit.step_noise.mean**2 / (rates * (2.0 - rates))
    return float(np.mean(variances * (powers @ multiplicity))) / count**2


class _Data(NamedTuple):
    """Lags and mean variogram, shape (K,), the weight of each lag's residual, and where rates lie, -1 to 1."""

    lags: FloatArray
    mean: FloatArray
    scale: FloatArray
    nodes: FloatArray

    def variogram(self, point: FloatArray) -> FloatArray:
        """D at (middle of log r, squared width, log s), shape (K,)."""
        half = 0.5 * np.sqrt(max(point[1], 0.0))
        rates = np.exp(point[0] + half * self.nodes)
        reached = -np.expm1(np.multiply.outer(np.log1p(-rates), self.lags))
        return np.exp(2.0 * point[2]) / len(rates) * (1.0 / (rates * (2.0 - rates))) @ reached

    def residual(self, point: FloatArray) -> FloatArray:
        """Weighted, shape (K,)."""
        return self.scale * (self.mean - self.variogram(point))

    def jacobian(self, point: FloatArray, free: list[int]) -> FloatArray:
        """Of the weighted variogram, by forward differences, which stay in range where the width is 0."""
        here, columns = self.variogram(point), []
        for index in free:
            shifted = point.copy()
            shifted[index] += _STEP
            columns.append((self.variogram(shifted) - here) / _STEP)
        return self.scale[:, None] * np.stack(columns, axis=1)


def _start(data: _Data) -> FloatArray:
    """The best point of a coarse grid."""
    best, lowest = np.zeros(3), np.inf
    fastest = min(0.9 * FASTEST, 5.0 / data.lags[0])
    for low in np.linspace(np.log(0.1 / data.lags[-1]), np.log(fastest), 16):
        for width in (0.0, 0.7, 1.5, 2.5, 4.0, 6.0):
            point = np.array([low + 0.5 * width, width**2, 0.0])
            if _log_fastest(point) > np.log(FASTEST):
                continue
            shape = data.scale * data.variogram(point)
            amplitude = shape @ (data.scale * data.mean) / (shape @ shape)
            point[2] = 0.5 * np.log(amplitude)
            residual = data.residual(point)
            if residual @ residual < lowest:
                lowest, best = residual @ residual, point
    return best


def _descend(start: FloatArray, data: _Data, free: list[int]) -> FloatArray:
    """Levenberg and Marquardt's iteration over the ``free`` parameters, the rates kept in range."""
    point, damping = start.copy(), 1e-3
    residual = data.residual(point)
    for _ in range(_ITERATIONS):
        jacobian = data.jacobian(point, free)
        curvature = jacobian.T @ jacobian
        damped = curvature + damping * np.diag(np.maximum(np.diag(curvature), 1e-12))
        trial = point.copy()
        trial[free] += np.linalg.solve(damped, jacobian.T @ residual)
        trial[0] = np.clip(trial[0], np.log(1e-3 / data.lags[-1]), np.log(FASTEST))
        trial[1] = np.clip(trial[1], 0.0, min(_WIDEST, 2.0 * (np.log(FASTEST) - trial[0])) ** 2)
        found = data.residual(trial)
        if found @ found >= residual @ residual:
            damping *= 4.0
            if damping > 1e12:
                break
            continue
        moved = np.abs(trial - point).max()
        point, residual, damping = trial, found, damping / 3.0
        if moved < 1e-9:
            break
    return point


def _log_fastest(point: FloatArray) -> float:
    return float(point[0] + 0.5 * np.sqrt(point[1]))


def _upper_limit(point: FloatArray, errors: FloatArray, data: _Data) -> FloatArray:
    """The best point with the squared width held two standard errors up."""
    wide = min(point[1] + 2.0 * np.sqrt(errors[1, 1]), _WIDEST**2)
    middle = min(point[0], np.log(FASTEST) - 0.5 * np.sqrt(wide))
    return _descend(np.array([middle, wide, point[2]]), data, free=[0, 2])


def _errors(point: FloatArray, data: _Data, covariance: FloatArray, free: list[int]) -> FloatArray:
    """The covariance of the parameters, shape (3, 3), zero for those that are not free."""
    inverse = np.linalg.pinv(data.jacobian(point, free)) * data.scale
    errors = np.zeros((3, 3))
    errors[np.ix_(free, free)] = inverse @ covariance @ inverse.T
    return errors
