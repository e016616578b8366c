"""The convex guarantee for pulled SGD, and a test function to hold it against."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from lagless._validation import check_number, require_integer
from lagless.rules import FloatArray
from lagless.theory.control._pulled_sgd import pulled_sgd
from lagless.theory.numerics import Estimate, estimate


@dataclass(frozen=True)
class ConvexGuarantee:
    """What pulled SGD is known to reach on any convex function, for the flat (η-weighted) average of its iterates.

        E F(θ̄) - F* ≤ (D² + Q Ση²)/(2Ση),      D² = Σ_i (1 + (1-β)/β·c_i) d_i²
        Q = V² + 2G(1 - β)KV/(β + (1 - β)c_min),     K = max_i c_i/(β + (1 - β)c_i),     V² = G² + σ²

    The average in the bound is that of the θ_k, not the exponential one that PACE returns.

    Args:
        distance: d = θ_1 - μ*, one number per coordinate.
        gains: the diagonal of C, one number in [0, 1] per coordinate.
        b: β in (0, 1).
        lipschitz: G > 0.
        noise: σ ≥ 0, with E||g - ∇F||² ≤ σ².

    Raises:
        ValueError: if an argument is out of range or lengths differ.

    Reference:
        Au and Block, arXiv 2606.25086, Theorem 3 and its general form in the appendix.

    >>> round(ConvexGuarantee(distance=(1.0,), gains=(0.0,), b=0.1, lipschitz=1.0, noise=0.0).best_bound(100), 12)
    0.1
    """

    distance: tuple[float, ...]
    gains: tuple[float, ...]
    b: float
    lipschitz: float
    noise: float

    def __post_init__(self) -> None:
        check_number(self, "b", above=0.0, below=1.0)
        check_number(self, "lipschitz", above=0.0, finite=True)
        check_number(self, "noise", minimum=0.0, finite=True)
        if len(self.gains) != len(self.distance) or not self.gains:
            raise ValueError(f"gains and distance need one number per coordinate; got {self.gains}, {self.distance}.")
        if not np.isfinite(self.distance).all():
            raise ValueError(f"distance={self.distance}; every number must be finite.")
        if not all(0.0 <= gain <= 1.0 for gain in self.gains):
            raise ValueError(f"gains={self.gains}; each must lie in [0, 1].")

    @property
    def squared_distance(self) -> float:
        """D²."""
        weights = 1.0 + (1.0 - self.b) / self.b * np.array(self.gains)
        return float(weights @ np.square(self.distance))

    @property
    def step_cost(self) -> float:
        """Q."""
        second_moment = self.lipschitz**2 + self.noise**2
        mixed = self.b + (1.0 - self.b) * np.array(self.gains)
        k = float((np.array(self.gains) / mixed).max())
        return second_moment + 2.0 * self.lipschitz * (1.0 - self.b) * k * sqrt(second_moment) / float(mixed.min())

    def bound(self, learning_rates: ArrayLike) -> float:
        """The bound for nonincreasing learning rates, shape (n,), one per averaged iterate.

        Raises:
            ValueError: if there is no learning rate, or one is not positive or exceeds the one before it.
        """
        eta = _learning_rates(learning_rates)
        if not (np.diff(eta) <= 0.0).all():
            raise ValueError(f"learning_rates={learning_rates!r}; they must not increase: the guarantee needs that.")
        return float((self.squared_distance + self.step_cost * (eta @ eta)) / (2.0 * eta.sum()))

    def best_learning_rate(self, steps: int) -> float:
        """The constant learning rate with the smallest bound over ``steps`` iterates: √(D²/(Q·steps)).

        Raises:
            ValueError: if ``steps`` is not an integer ≥ 1.
        """
        require_integer("steps", steps, minimum=1)
        return sqrt(self.squared_distance / (self.step_cost * steps))

    def best_bound(self, steps: int) -> float:
        """The bound at :meth:`best_learning_rate`, √(D²Q/steps); at most √(2 - β)/β·||d||V/√steps for any gains.

        Raises:
            ValueError: if ``steps`` is not an integer ≥ 1.
        """
        require_integer("steps", steps, minimum=1)
        return sqrt(self.squared_distance * self.step_cost / steps)


def absolute_value_gap(guarantee: ConvexGuarantee, learning_rates: ArrayLike, paths: int, seed: int) -> Estimate:
    """E F(θ̄) - F* of pulled SGD on F(θ) = (G/√n) Σ|θ_i - μ_i|, simulated.

    The subgradient's noise is Gaussian with standard deviation σ/√n per coordinate, so that F meets what
    ``guarantee`` assumes: compare with :meth:`ConvexGuarantee.bound`.

    Args:
        guarantee: start, gains, β, G and σ.
        learning_rates: shape (T,), η_k; the average is θ̄ = Ση_kθ_k/Ση_k over the T iterates before each step.
        paths: ≥ 2, independent runs.
        seed: of the noise.

    Raises:
        ValueError: if ``paths`` is not an integer ≥ 2, or there is no learning rate or one that is not positive.
    """
    require_integer("paths", paths, minimum=2)
    rng = np.random.default_rng(seed)
    eta = _learning_rates(learning_rates)
    scale = 1.0 / sqrt(len(guarantee.distance))
    start = np.tile(np.array(guarantee.distance, dtype=np.float64), (paths, 1))

    def subgradient(iterate: FloatArray) -> FloatArray:
        noise = guarantee.noise * rng.standard_normal(iterate.shape)
        return scale * (guarantee.lipschitz * np.sign(iterate) + noise)

    states = pulled_sgd(subgradient, start, eta, guarantee.b, guarantee.gains)
    flat = np.zeros_like(start)
    for weight, state in zip(eta / eta.sum(), states, strict=False):  # the state after the last step is not averaged
        flat += weight * state.iterate
    return estimate(guarantee.lipschitz * scale * np.abs(flat).sum(axis=1))


def _learning_rates(given: ArrayLike) -> FloatArray:
    eta = np.asarray(given, dtype=np.float64)
    if eta.ndim != 1 or not eta.size or not ((eta > 0.0) & (eta < np.inf)).all():
        raise ValueError(f"learning_rates={given!r}; it must be a sequence of one or more numbers > 0.")
    return eta
