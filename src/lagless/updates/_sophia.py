"""Sophia's preconditioner from sampled-label gradients, and what the convexity of its inverse is corrected by.

References: Liu et al., arXiv 2305.14342 (Sophia-G); Nayak et al., arXiv 2605.20756 (correction).
"""

from __future__ import annotations

from torch import Tensor

from lagless.updates._spread import Spread


def sophia_variance(squares: Spread, beta2: float, scale: float) -> Tensor:
    """V = (c(1 - β₂))² Var(mean of q_j²): the variance of P = c(β₂h + (1 - β₂)·mean q_j²) + ε.

    P is affine in q_j², so it is the same whether taken before or after the running average.
    """
    return (scale * (1.0 - beta2)) ** 2 * squares.variance_of_mean(squares.nodes)


def sophia_inverse(h: Tensor, scale: float, eps: float, variance: Tensor | None = None) -> Tensor:
    """max(0, 1/P - V/P³) with P = c·h + ε.

    Args:
        h: running average of squared sampled-label gradients, this step's included.
        scale: c = ρ · batch size.
        eps: ε.
        variance: V of :func:`sophia_variance`; None for no correction.
    """
    preconditioner = scale * h + eps
    inverse = preconditioner.reciprocal()
    if variance is not None:
        inverse = (inverse - variance * inverse * inverse * inverse).clamp_(min=0.0)
    return inverse


def sophia_update(m: Tensor, inverse: Tensor, clip: float) -> Tensor:
    """u = m/P, clamped to [-clip, clip]."""
    return (m * inverse).clamp_(-clip, clip)
