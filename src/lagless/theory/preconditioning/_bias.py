"""How far Adam's update is off on average, and for which of two reasons: Monte Carlo over a fixed gradient law.

With u = numerator × inverse and the population update u* = μ/D*, D* = √v* + ε,

    E[u]/u* - 1  =  E[(m̂ - μ)(D*·inverse - 1)]/μ   coupling: numerator and preconditioner share their noise
                 +  E[D*·inverse] - 1               inversion: 1/x is convex

exactly, because E m̂ = μ. All biases are relative to u*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import Literal, NamedTuple

import numpy as np

from lagless._validation import check_choice, check_number, require_integer
from lagless.rules import FloatArray
from lagless.theory.numerics import Estimate, check_time, estimate
from lagless.theory.preconditioning._preconditioners import EmaWeights, Folds, UpdateEstimator


@dataclass(frozen=True)
class GradientLaw:
    """Independent microbatch gradients of one coordinate, of the same law at every step.

    Args:
        mean: μ ≠ 0, the gradient.
        std: > 0, the standard deviation of one microbatch's mean gradient: σ/√b for b samples of deviation σ.
        microbatches: n ≥ 1 per step.
        halves: what the second half of a step's microbatches is, which ``split`` makes its preconditioner from.
            "fresh": drawn like the first; "rolling": the next step's first half; "same": the first half again.
        noise: "normal", or "exponential" for a skewed one of the same variance.

    Raises:
        ValueError: if an argument is out of range.
    """

    mean: float
    std: float
    microbatches: int
    halves: Literal["fresh", "rolling", "same"] = "fresh"
    noise: Literal["normal", "exponential"] = "normal"

    def __post_init__(self) -> None:
        check_number(self, "mean", finite=True)
        check_number(self, "std", above=0.0, finite=True)
        require_integer("GradientLaw: microbatches", self.microbatches, minimum=1)
        check_choice(self, "halves", ("fresh", "rolling", "same"))
        check_choice(self, "noise", ("normal", "exponential"))
        if self.halves != "fresh" and self.microbatches % 2:
            raise ValueError(f"GradientLaw: microbatches={self.microbatches}; two halves need an even number.")
        if self.mean == 0.0:
            raise ValueError("GradientLaw: mean=0; biases are relative to it, so it must not be 0.")

    def steps(self, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        """Gradients of one step after the other, of ``size`` independent runs, shape (n, size)."""
        if self.halves == "fresh":
            while True:
                yield self._draw(rng, self.microbatches, size)
        following = self._draw(rng, self.microbatches // 2, size)
        while True:
            half, following = following, self._draw(rng, self.microbatches // 2, size)
            yield np.concatenate([half, half if self.halves == "same" else following])

    def _draw(self, rng: np.random.Generator, count: int, size: int) -> FloatArray:
        if self.noise == "exponential":
            return self.mean + self.std * (rng.exponential(1.0, (count, size)) - 1.0)
        return rng.normal(self.mean, self.std, (count, size))

    def second_moment(self, averaged: int) -> float:
        """E of the squared mean of ``averaged`` microbatches: μ² + std²/averaged."""
        return self.mean**2 + self.std**2 / averaged


class PreconditionerBias(NamedTuple):
    """Relative biases of an update, as fractions of the population update.

    Attributes:
        total: E[u]/u* - 1, the sum of the other two.
        coupling: the part from noise common to numerator and preconditioner.
        inversion: the part from the preconditioner alone.
    """

    total: Estimate
    coupling: Estimate
    inversion: Estimate


@dataclass(frozen=True)
class _Target:
    """Second moments in expectation: what m, v start from, v*, and what v̂ averages to."""

    stored: float
    population: float
    expected: float

    @classmethod
    def of(cls, estimator: UpdateEstimator, law: GradientLaw, beta2: float) -> _Target:
        n = law.microbatches
        stored = law.second_moment(1 if estimator.cross_fit == "split" else n)
        fresh = stored
        if estimator.cross_fit == "symmetric":
            fresh = law.second_moment(1)
        elif estimator.cross_fit == "leave_one_out":
            fresh = law.second_moment(n - 1)
        expected = beta2 * stored + (1.0 - beta2) * fresh
        # Leaving one out approximates the full batch's preconditioner, so that is what it is held against.
        return cls(stored, stored if estimator.cross_fit == "leave_one_out" else expected, expected)


def one_step_bias(
    estimator: UpdateEstimator, law: GradientLaw, beta2: float, samples: int, seed: int, eps: float = 0.0
) -> PreconditionerBias:
    """The bias that one step's own noise causes: no momentum, and v before the step at its population value.

    Args:
        estimator: how the update is formed.
        law: where gradients come from. ``split`` divides its microbatches: twice as many, for full-size halves.
        beta2: β₂ in [0, 1).
        samples: ≥ 2, independent steps.
        seed: of the gradients.
        eps: ε ≥ 0.

    Returns:
        Total, coupling and inversion with standard errors. v* is the expectation of v̂: for ``none`` μ² + std²/n, for
        ``split`` μ² + std², for ``symmetric`` β₂ of the former and 1 - β₂ of the latter; for ``leave_one_out`` that of
        ``none``, so that having one microbatch less counts as inversion bias.

    Raises:
        ValueError: if a number is out of range or ``law.microbatches`` does not suit the estimator.

    >>> from lagless.theory import AdamEstimator
    >>> bias = one_step_bias(AdamEstimator(), GradientLaw(0.5, 1.0, 8), beta2=0.95, samples=100_000, seed=0)
    >>> round(bias.total.mean, 3)
    -0.015
    """
    _check(eps, beta2=beta2)
    require_integer("samples", samples, minimum=2)
    target = _Target.of(estimator, law, beta2)
    weights = EmaWeights.at((0.0, beta2))
    moments = estimator.start(np.array(law.mean), np.array(target.stored))
    rng = np.random.default_rng(seed)
    parts = []
    for size in _chunks(samples):
        folds = estimator.folds(next(law.steps(rng, size)), moments, weights, eps)
        parts.append(_parts(folds, law.mean, target, eps))
    return _report(np.concatenate(parts, axis=1))


def stationary_bias(
    estimator: UpdateEstimator,
    law: GradientLaw,
    betas: tuple[float, float],
    steps: int,
    chains: int,
    seed: int,
    eps: float = 0.0,
) -> PreconditionerBias:
    """The bias in the long run, when m and v carry the noise of many steps.

    Chains start at the population moments and run until 1e-5 of that start is left, then for ``steps`` steps. A
    standard error is taken over the chains' averages over time, which are independent.

    Args:
        estimator: how the update is formed.
        law: where gradients come from.
        betas: (β₁, β₂), each in [0, 1).
        steps: ≥ 1, averaged over.
        chains: ≥ 2.
        seed: of the gradients.
        eps: ε ≥ 0.

    Returns:
        As :func:`one_step_bias`.

    Raises:
        ValueError: if a number is out of range or ``law.microbatches`` does not suit the estimator.
    """
    if len(betas) != 2:
        raise ValueError(f"betas={betas!r}; it must be (beta1, beta2).")
    _check(eps, beta1=betas[0], beta2=betas[1])
    require_integer("steps", steps, minimum=1)
    require_integer("chains", chains, minimum=2)
    target = _Target.of(estimator, law, betas[1])
    weights = EmaWeights.at(betas)
    slowest = max(betas)
    burn_in = ceil(log(1e-5) / log(slowest)) if slowest > 0.0 else 0
    rng = np.random.default_rng(seed)
    moments = estimator.start(np.full(chains, law.mean), np.full(chains, target.stored))
    mean = np.zeros((2, chains))
    for step, gradients in zip(range(burn_in + steps), law.steps(rng, chains), strict=False):
        if step >= burn_in:
            mean += _parts(estimator.folds(gradients, moments, weights, eps), law.mean, target, eps) / steps
        moments = estimator.absorb(gradients, moments, betas)
    return _report(mean)


def _parts(folds: Folds, mean: float, target: _Target, eps: float) -> FloatArray:
    """Coupling and inversion of each sample, shape (2, samples).

    The inversion carries the control variate (v̂ - E v̂)/(2√v* D*), of mean 0, which removes its first-order noise.
    """
    root = sqrt(target.population)
    excess = (root + eps) * folds.inverse - 1.0
    coupling = (folds.numerator - mean) * excess / mean
    inversion = excess + (folds.second_moment - target.expected) / (2.0 * root * (root + eps))
    return np.stack([coupling.mean(axis=0), inversion.mean(axis=0)])


def _report(parts: FloatArray) -> PreconditionerBias:
    return PreconditionerBias(estimate(parts.sum(axis=0)), estimate(parts[0]), estimate(parts[1]))


def _chunks(samples: int) -> list[int]:
    size = 50_000
    return [size] * (samples // size) + ([samples % size] if samples % size else [])


def _check(eps: float, **betas: float) -> None:
    check_time("eps", eps)
    for name, beta in betas.items():
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}={beta!r}; it must lie in [0, 1).")
