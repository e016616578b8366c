"""Shampoo's inverse fourth roots, and what their convexity is corrected by.

References: Gupta et al., arXiv 1802.09568 (Shampoo); Nayak et al., arXiv 2605.20756 (correction).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lagless.updates._linalg import LinAlgError, eigh


class Eigenbasis(NamedTuple):
    """λ, ascending, shape (..., d), and Q with eigenvectors as columns, shape (..., d, d)."""

    values: Tensor
    vectors: Tensor


def eigenbasis(factor: Tensor, damping: float) -> Eigenbasis:
    """That of L + damping · I, for a batch of factors; λ ≥ damping/1000 in spite of rounding."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    damped = factor + damping * identity
    try:
        values, vectors = eigh(damped)
    except LinAlgError:  # float32 iterations may fail to converge where those of float64 do not
        values, vectors = (x.to(factor.dtype) for x in eigh(damped.double()))
    return Eigenbasis(values.clamp(min=1e-3 * damping), vectors)


def energies(gradient: Tensor, vectors: Tensor) -> Tensor:
    """‖Gᵀq_k‖² for every eigenvector of the left side, shape (..., d); for the right side give Gᵀ."""
    return (gradient.mT @ vectors).square().sum(dim=-2)


def inverse_fourth_root(basis: Eigenbasis, variance: Tensor | None = None, largest: float | None = None) -> Tensor:
    """P = Q diag(d) Qᵀ, d_k = λ_k^{-1/4} - (5/32) λ_k^{-9/4} V_k, clamped to [0, ``largest``].

    Args:
        basis: of the damped factor.
        variance: V_k = (1 - β₂)² Var(mean over microbatches of ‖G_jᵀq_k‖²), the variance of λ_k; None for 0.
        largest: of d_k.
    """
    d = basis.values.pow(-0.25)
    if variance is not None:
        d = d - 5.0 / 32.0 * basis.values.pow(-2.25) * variance
    d = d.clamp(min=0.0, max=largest)
    return (basis.vectors * d.unsqueeze(-2)) @ basis.vectors.mT
