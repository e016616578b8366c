"""Corrections of Adam by expanding its bias, which need the mean and the variance over microbatches only.

With V̂ the unbiased variance of ḡ, w = √v̂, D = w + ε, κ₁ and κ the weights of this step's gradient in m̂ and v̂:

    φ_v = -1/(2wD²),   φ_vv = 1/(2v̂D³) + 1/(4v̂wD²)   of φ(v̂) = 1/D
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lagless.rules import FloatArray
from lagless.theory.preconditioning._preconditioners import AdamEstimator, Folds, Moments
from lagless.updates import CrossFit, EmaWeights

_LEFT_OUT = AdamEstimator("leave_one_out", two_nodes=True)


@dataclass(frozen=True)
class FirstOrderAdam(AdamEstimator):
    """Leave-one-out to first order in the variance: u = m̂/D + κ₁κ ḡ V̂/(wD²)."""

    def folds(self, gradients: FloatArray, moments: Moments, weights: EmaWeights, eps: float = 0.0) -> Folds:
        """The update as one fold."""
        g, variance = gradients.mean(axis=0), gradients.var(axis=0, ddof=1) / len(gradients)
        second = weights.v_old * moments.v + weights.v_new * g * g
        root, numerator = np.sqrt(second), weights.m_old * moments.m + weights.m_new * g
        d = root + eps
        return _one_fold(
            numerator, numerator / d + weights.m_new * weights.v_new * g * variance / (root * d**2), second
        )


@dataclass(frozen=True)
class InvertedAdam(AdamEstimator):
    """Leave-one-out by two nodes, less ½ m̂ φ_vv κ² Var(ḡ²): the inversion bias of this step, in terms of v̂."""

    def folds(self, gradients: FloatArray, moments: Moments, weights: EmaWeights, eps: float = 0.0) -> Folds:
        """The update as one fold."""
        g, variance = gradients.mean(axis=0), gradients.var(axis=0, ddof=1) / len(gradients)
        left_out = _LEFT_OUT.folds(gradients, moments, weights, eps).update
        second = weights.v_old * moments.v + weights.v_new * g * g
        numerator = weights.m_old * moments.m + weights.m_new * g
        spread = weights.v_new**2 * np.maximum(4.0 * g * g * variance - 2.0 * variance**2, 0.0)
        return _one_fold(numerator, left_out - 0.5 * numerator * _second_derivative(second, eps) * spread, second)


class History(NamedTuple):
    """Adam's moments and how their noise is correlated: c with that of m, w the variance of v."""

    m: FloatArray
    v: FloatArray
    c: FloatArray
    w: FloatArray


@dataclass(frozen=True)
class FullHistoryAdam:
    """Both biases to second order, from covariances that pass through the same running averages as m and v.

        C ← β₁β₂C + (1 - β₁)(1 - β₂) 2ḡV̂,   W ← β₂²W + (1 - β₂)²(4ḡ²V̂ - 2V̂²)
        u = m̂/D - φ_v C/(c₁c₂) - ½ m̂ φ_vv max(W, 0)/c₂²,   c_i = 1 - β_iᵗ

    Args:
        coupling: subtract the second term.
        inversion: subtract the third.
    """

    coupling: bool = True
    inversion: bool = True

    @property
    def cross_fit(self) -> CrossFit:
        """Adam's own preconditioner."""
        return "none"

    def start(self, m: FloatArray, v: FloatArray) -> History:
        """The state before the first step."""
        return History(m, v, np.zeros_like(v), np.zeros_like(v))

    def folds(self, gradients: FloatArray, moments: History, weights: EmaWeights, eps: float = 0.0) -> Folds:
        """The update as one fold. The split into coupling and inversion has no meaning for it."""
        g, variance = gradients.mean(axis=0), gradients.var(axis=0, ddof=1) / len(gradients)
        second = weights.v_old * moments.v + weights.v_new * g * g
        numerator = weights.m_old * moments.m + weights.m_new * g
        root = np.sqrt(second)
        d = root + eps
        update = numerator / d
        if self.coupling:
            c = weights.m_old * weights.v_old * moments.c + weights.m_new * weights.v_new * 2.0 * g * variance
            update = update + c / (2.0 * root * d**2)
        if self.inversion:
            w = weights.v_old**2 * moments.w + weights.v_new**2 * (4.0 * g * g * variance - 2.0 * variance**2)
            update = update - 0.5 * numerator * _second_derivative(second, eps) * np.maximum(w, 0.0)
        return _one_fold(numerator, update, second)

    def absorb(self, gradients: FloatArray, moments: History, betas: tuple[float, float]) -> History:
        """The state after this step."""
        (b1, b2), n = betas, len(gradients)
        m, v = AdamEstimator().absorb(gradients, Moments(moments.m, moments.v), betas)
        g, variance = gradients.mean(axis=0), gradients.var(axis=0, ddof=1) / n
        c = b1 * b2 * moments.c + (1.0 - b1) * (1.0 - b2) * 2.0 * g * variance
        w = b2**2 * moments.w + (1.0 - b2) ** 2 * (4.0 * g * g * variance - 2.0 * variance**2)
        return History(m, v, c, w)


def _second_derivative(second: FloatArray, eps: float) -> FloatArray:
    root = np.sqrt(second)
    d = root + eps
    return 1.0 / (2.0 * second * d**3) + 1.0 / (4.0 * second * root * d**2)


def _one_fold(numerator: FloatArray, update: FloatArray, second: FloatArray) -> Folds:
    return Folds(numerator[None], (update / numerator)[None], second[None])
