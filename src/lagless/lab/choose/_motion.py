"""A run as drift and noise over a spectrum of curvatures, fitted to the inner products of its increments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lagless.lab.choose._learning_rate import LearningRate
from lagless.rules import FloatArray

_RATES = 12
_SLOWEST, _FASTEST = 0.5, 3.0  # times the inverse of the length of the run, and of the distance of its checkpoints
_FORGOTTEN = 40.0  # a drift that is e^-40 of its start at the end of the run is no drift
_SUBSTEPS = 8  # between two checkpoints
_UNRESOLVED = 2.0  # rates above it, times the distance of checkpoints, are forgotten from one to the next


class Change(NamedTuple):
    """By how much averages change the loss, split by cause, in one unknown unit; negative is better.

    Attributes:
        noise: what the average of fluctuations saves, shape (M,).
        drift: what being behind costs, shape (M,).
    """

    noise: FloatArray
    drift: FloatArray

    @property
    def total(self) -> FloatArray:
        """Of both, shape (M,)."""
        return self.noise + self.drift


class Motion(NamedTuple):
    """A fitted run.

    Attributes:
        rates: r_k of each mode, per step at the peak learning rate, shape (K,).
        noise: covariance of the iterates of a unit of noise in mode k, times its amplitude, shape (K, N, N).
        drift: the same of the drift.
        misfit: norm of what is not fitted over that of what is to be fitted, each increment scaled to length 1.
        unresolved: share of the noise's loss in modes that are forgotten from one checkpoint to the next; their
            curvature, and with it what averaging gains, may be larger than fitted.
    """

    rates: FloatArray
    noise: FloatArray
    drift: FloatArray
    misfit: float
    unresolved: float

    def change(self, weights: FloatArray) -> Change:
        """Return the loss of averages minus that of the last iterate, in units of 1/η for the peak learning rate η.

            ½ Σ_k r_k (wᵀ C_k w - C_k,NN)        C_k = noise_k + drift_k

        The curvature of a mode is r_k/η, as for any gradient descent; an adaptive optimizer has it in its own metric.

        Args:
            weights: shape (M, N), rows that sum to 1.
        """
        noise, drift = (
            np.einsum("k,kij,mi,mj->m", 0.5 * self.rates, part, weights, weights)
            - 0.5 * float(self.rates @ part[:, -1, -1])
            for part in (self.noise, self.drift)
        )
        return Change(noise, drift)


def fit_motion(products: FloatArray, steps: Sequence[int], rate: LearningRate) -> Motion:
    """Fit drift and noise to the inner products of increments, by least squares with amplitudes that are not negative.

    A direction of curvature a moves by dθ = -η λ a (θ - θ*) dt + η λ σ dW, with λ(t) the learning rate over its peak η.
    With S = ∫ λ dt and r = η a, iterates i and j have, around θ*, products that are sums over the spectrum of

        noise    s² V_i e^{-r (S_j - S_i)}, i ≤ j,   V' = -2 r λ V + λ²,   V_0 = λ_0/(2r)
        drift    d² e^{-r (S_i + S_j)}
        walk     q² ∫_0^{t_i} λ² dt,   directions too flat to matter for the loss

    and the amplitudes s², d² per rate and q² are fitted, for rates from half the inverse of the run's length to three
    times that of the distance of its checkpoints. The sum over all parameters does not depend on the basis, so no
    eigenvectors are needed. Products are divided by the lengths of their increments before they are fitted, so early
    and late parts of a run count alike.

    Args:
        products: <Δ_i, Δ_j>, shape (N - 1, N - 1), as of :func:`increment_products`.
        steps: of the N checkpoints.
        rate: the learning rate.

    Raises:
        ValueError: if two neighbouring checkpoints are the same, or there are fewer than 3.
    """
    from scipy.optimize import nnls

    times = np.asarray(steps, dtype=np.float64)
    _check(products, steps)
    clock = _Clock(times, rate)
    spacing = float(np.median(np.diff(clock.passed)))
    rates = np.geomspace(_SLOWEST / clock.passed[-1], _FASTEST / spacing, _RATES)
    drifting = rates * clock.passed[-1] < _FORGOTTEN
    noise = np.stack([clock.noise(r) for r in rates])
    drift = np.stack([np.exp(-r * np.add.outer(clock.passed, clock.passed)) for r in rates[drifting]])
    shapes = np.concatenate([noise, drift, clock.walk()[None]])
    lengths = np.sqrt(np.diag(products))
    upper = np.triu_indices(len(lengths))
    scale = np.outer(lengths, lengths)[upper]
    columns = np.stack([_increments(shape)[upper] / scale for shape in shapes], axis=1)
    target = products[upper] / scale
    norms = np.linalg.norm(columns, axis=0)
    amplitudes, residual = nnls(columns / norms, target)
    amplitudes = amplitudes / norms
    fitted_noise = amplitudes[:_RATES, None, None] * noise
    fitted_drift = np.zeros_like(fitted_noise)
    fitted_drift[drifting] = amplitudes[_RATES:-1, None, None] * drift
    of_noise = rates * fitted_noise[:, -1, -1]
    unseen = float(of_noise[rates * spacing > _UNRESOLVED].sum())
    return Motion(
        rates,
        fitted_noise,
        fitted_drift,
        misfit=float(residual / np.linalg.norm(target)),
        unresolved=unseen / float(of_noise.sum()) if of_noise.any() else 0.0,
    )


def _check(products: FloatArray, steps: Sequence[int]) -> None:
    if len(steps) < 3:
        raise ValueError(
            f"{len(steps)} checkpoints (steps {', '.join(map(str, steps))}); drift can be told from noise with 3 or "
            "more, and well with 10. Keep more of them while training (save_steps, save_total_limit)."
        )
    for i in np.flatnonzero(~(np.diag(products) > 0.0)).tolist():
        raise ValueError(
            f"the checkpoints at steps {steps[i]} and {steps[i + 1]} hold the same weights. If one is a copy of the "
            "other, leave it out (--steps)."
        )


def _increments(of_iterates: FloatArray) -> FloatArray:
    return np.diff(np.diff(of_iterates, axis=0), axis=1)


class _Clock:
    """Time as the learning rate counts it, on a grid finer than the checkpoints'."""

    def __init__(self, times: FloatArray, rate: LearningRate) -> None:
        shares = np.arange(_SUBSTEPS) / _SUBSTEPS
        self._grid = np.append((times[:-1, None] + np.diff(times)[:, None] * shares).ravel(), times[-1])
        self._rate = rate.at((self._grid[1:] + self._grid[:-1]) / 2.0)
        self._passing = self._rate * np.diff(self._grid)
        self.passed = np.append(0.0, np.cumsum(self._passing))[::_SUBSTEPS]
        """S at every checkpoint, 0 at the first."""

    def noise(self, rate: float) -> FloatArray:
        """V_i e^{-r |S_j - S_i|} with i the earlier of two iterates, shape (N, N)."""
        variance = np.empty(len(self._grid))
        variance[0] = self._rate[0] / (2.0 * rate)
        kept = np.exp(-2.0 * rate * self._passing)
        for i, (keep, multiplier) in enumerate(zip(kept, self._rate, strict=True)):
            variance[i + 1] = keep * variance[i] + (1.0 - keep) * multiplier / (2.0 * rate)
        return self._earlier(variance) * np.exp(-rate * np.abs(np.subtract.outer(self.passed, self.passed)))

    def walk(self) -> FloatArray:
        """∫ λ² dt up to the earlier of two iterates, shape (N, N)."""
        return self._earlier(np.append(0.0, np.cumsum(self._rate * self._passing)))

    def _earlier(self, values: FloatArray) -> FloatArray:
        at_iterates = values[::_SUBSTEPS]
        order = np.arange(len(at_iterates))
        return at_iterates[np.minimum.outer(order, order)]
