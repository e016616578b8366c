"""Adam's update and its bias-corrected forms for one coordinate, as pure functions of microbatch gradients.

An update divides a numerator by a preconditioner made from the same gradients. *Cross-fitting* makes the two from
different microbatches; *inverse correction* subtracts what the convexity of 1/x adds on average. Both change an update
into a mean over folds of (numerator × inverse).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from lagless._validation import check_choice
from lagless.filters import FloatArray

CrossFit = Literal["none", "split", "symmetric", "leave_one_out"]
InverseCorrection = Literal["none", "post_ema", "pre_ema", "jackknife"]
CORRECTIONS: dict[CrossFit, tuple[InverseCorrection, ...]] = {
    "none": ("none", "post_ema", "pre_ema"),
    "split": ("none", "post_ema", "pre_ema"),
    "symmetric": ("none", "post_ema", "pre_ema"),
    "leave_one_out": ("none", "jackknife"),
}


class Moments(NamedTuple):
    """Adam's two running averages before bias correction; numbers or arrays of one shape."""

    m: FloatArray
    v: FloatArray


class EmaWeights(NamedTuple):
    """What bias-corrected moments consist of at a step: m̂ = m_old·m + m_new·g, v̂ = v_old·v + v_new·s."""

    m_old: float
    m_new: float
    v_old: float
    v_new: float

    @classmethod
    def at(cls, betas: tuple[float, float], step: float = math.inf) -> EmaWeights:
        """The weights at ``step`` (1-based); infinity is the limit without bias correction."""
        (b1, b2), (c1, c2) = betas, (1.0 - betas[0] ** step, 1.0 - betas[1] ** step)
        return cls(b1 / c1, (1.0 - b1) / c1, b2 / c2, (1.0 - b2) / c2)


class Folds(NamedTuple):
    """An update as a mean of products; each array has shape (folds, *gradient shape).

    Attributes:
        numerator: m̂ of each fold.
        inverse: what it is multiplied by, 1/(√v̂ + ε) less its correction.
        second_moment: v̂ of each fold.
    """

    numerator: FloatArray
    inverse: FloatArray
    second_moment: FloatArray

    @property
    def update(self) -> FloatArray:
        """u, the mean over folds of numerator × inverse."""
        return (self.numerator * self.inverse).mean(axis=0)


@dataclass(frozen=True)
class AdamEstimator:
    """A way to form Adam's update from the gradients g_1..g_n of n microbatches at the same parameters.

    ============== ==================================== ==============================================
    cross_fit      numerator                            second moment s
    ============== ==================================== ==============================================
    none           ḡ                                    ḡ²
    split          ḡ_A, the first half                  mean of g_j² over B, the second half
    symmetric      both halves, each divided by what the other one gives; m and v move on as for none
    leave_one_out  g_r, mean over r                     ḡ_{-r}², r's microbatch left out; m, v as for none
    ============== ==================================== ==============================================

    With D = √v̂ + ε the inverse is 1/D less a second-order term, clamped at 0:

    * ``post_ema``: V/D³, V the variance of the mean of √(v̂ with g_j² for s) over microbatches
    * ``pre_ema``: κ²V_s(1/(4v̂D³) + 1/(8v̂^{3/2}D²)), V_s the variance of the mean of g_j², κ the weight of s in v̂
    * ``jackknife`` (leave_one_out only): V/D_r³, V = (n - 1)/n Σ(D_r - D̄)²; where that turns the update's sign, 0

    Args:
        cross_fit: how numerator and second moment are kept apart.
        inverse_correction: what is subtracted from the inverse.

    Raises:
        ValueError: for an unknown name or a correction that ``cross_fit`` does not have.

    Reference:
        Nayak et al., arXiv 2605.20756: cross-fitting and variance-corrected inversion. The second term of ``pre_ema``
        has the factor 1/8 of the second derivative, not 3/8 as in the authors' code; ``jackknife`` scales the
        variance of the D_r by (n - 1)²/n, which their code omits.
    """

    cross_fit: CrossFit = "none"
    inverse_correction: InverseCorrection = "none"

    def __post_init__(self) -> None:
        check_choice(self, "cross_fit", tuple(CORRECTIONS))
        check_choice(self, "inverse_correction", CORRECTIONS[self.cross_fit])

    def folds(self, gradients: FloatArray, moments: Moments, weights: EmaWeights, eps: float = 0.0) -> Folds:
        """The parts of the update.

        Args:
            gradients: shape (n, ...), one row per microbatch; an even n for split and symmetric, n ≥ 2 otherwise.
            moments: m and v before this step, shape (...).
            weights: of old and new in m̂ and v̂, :meth:`EmaWeights.at`.
            eps: ε ≥ 0, outside the root.

        Raises:
            ValueError: if the number of microbatches does not suit, or a half has one of them where a variance is
                asked for.
        """
        self._check_count(len(gradients))
        if self.cross_fit == "leave_one_out":
            return self._leave_one_out(gradients, moments, weights, eps)
        sides = [self._side(top, below, moments, weights, eps) for top, below in self._groups(gradients)]
        return Folds(*(np.stack(parts) for parts in zip(*sides, strict=True)))

    def absorb(self, gradients: FloatArray, moments: Moments, betas: tuple[float, float]) -> Moments:
        """m and v after this step: (1 - β)·new + β·old, new being (ḡ_A, s_B) for split and (ḡ, ḡ²) otherwise."""
        if self.cross_fit == "split":
            a, b = np.split(gradients, 2)
            g, s = a.mean(axis=0), np.square(b).mean(axis=0)
        else:
            g = gradients.mean(axis=0)
            s = g * g
        b1, b2 = betas
        return Moments(b1 * moments.m + (1.0 - b1) * g, b2 * moments.v + (1.0 - b2) * s)

    def _check_count(self, n: int) -> None:
        halves = self.cross_fit in ("split", "symmetric")
        minimum = 1 if self == AdamEstimator() else 4 if halves and self.inverse_correction != "none" else 2
        if n < minimum or (halves and n % 2):
            raise ValueError(f"{n} microbatches; {self} needs {'an even number ' if halves else ''}>= {minimum}.")

    def _groups(self, gradients: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
        """The microbatches of (numerator, preconditioner), one pair per fold."""
        if self.cross_fit == "none":
            return [(gradients, gradients)]
        a, b = np.split(gradients, 2)
        return [(a, b), (b, a)] if self.cross_fit == "symmetric" else [(a, b)]

    def _side(
        self, top: FloatArray, below: FloatArray, moments: Moments, weights: EmaWeights, eps: float
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        squares = below * below
        s = below.mean(axis=0) ** 2 if self.cross_fit == "none" else squares.mean(axis=0)
        second = weights.v_old * moments.v + weights.v_new * s
        root = np.sqrt(second)
        d = root + eps
        inverse = 1.0 / d
        if self.inverse_correction == "post_ema":
            inverse -= _variance_of_mean(np.sqrt(weights.v_old * moments.v + weights.v_new * squares)) / d**3
        elif self.inverse_correction == "pre_ema":
            curvature = 1.0 / (4.0 * second * d**3) + 1.0 / (8.0 * second * root * d**2)
            inverse -= weights.v_new**2 * _variance_of_mean(squares) * curvature
        numerator = weights.m_old * moments.m + weights.m_new * top.mean(axis=0)
        return numerator, np.maximum(0.0, inverse), second

    def _leave_one_out(self, gradients: FloatArray, moments: Moments, weights: EmaWeights, eps: float) -> Folds:
        n = len(gradients)
        others = (gradients.sum(axis=0) - gradients) / (n - 1)
        second = weights.v_old * moments.v + weights.v_new * others * others
        d = np.sqrt(second) + eps
        numerator = weights.m_old * moments.m + weights.m_new * gradients
        inverse = 1.0 / d
        if self.inverse_correction == "jackknife":
            corrected = inverse - (n - 1) ** 2 * _variance_of_mean(d) / d**3
            same_sign = (numerator * corrected).mean(axis=0) * (numerator * inverse).mean(axis=0) >= 0.0
            inverse = np.where(same_sign, corrected, 0.0)
        return Folds(numerator, inverse, second)


def _variance_of_mean(samples: FloatArray) -> FloatArray:
    """Σ(x_j - x̄)²/(k(k - 1)) over the first axis, of length k ≥ 2."""
    return samples.var(axis=0, ddof=1) / len(samples)
