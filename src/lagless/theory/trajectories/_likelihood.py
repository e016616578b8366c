"""The likelihood of μ* given a trajectory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from lagless.theory.numerics import inverse
from lagless.theory.trajectories._process import OrnsteinUhlenbeck


def log_likelihood(process: OrnsteinUhlenbeck, mu: ArrayLike, times: ArrayLike, path: torch.Tensor) -> torch.Tensor:
    """The log-likelihood of a minimum at ``mu`` against driftless noise, log dP^μ/dP^W, of sampled paths.

        (1/η) ∫ ⟨Σ⁻²A(μ - θ), dθ⟩ - (1/2η) ∫ ||Σ⁻¹A(μ - θ)||² dt

    The first integral is an Itô sum, the second trapezoidal over ``times``. It is quadratic in μ, and
    ``MaximumLikelihood().estimate`` on the same times is its maximiser exactly.

    Args:
        process: which A, Σ and η; its own μ* is not looked at.
        mu: shape (d,).
        times: shape (n,), from 0 to T.
        path: shape (..., n, d), float64.

    Returns:
        Shape (...).

    Reference:
        Block and Zhang, arXiv 2508.00180, Theorem 3 and Prop. 4. (Prop. 4 prints the first integral with the opposite
        sign, which Theorem 3 and the proof of Theorem 4 do not have.)
    """
    moments = np.asarray(times, dtype=np.float64)
    gaps = torch.as_tensor(np.diff(moments), dtype=torch.float64).to(path)
    whiten = inverse(process.Sigma)
    distance = torch.as_tensor(np.asarray(mu, dtype=np.float64), dtype=torch.float64).to(path) - path
    whitened = distance @ torch.as_tensor(process.A @ whiten, dtype=torch.float64).to(path)
    moved = torch.diff(path, dim=-2) @ torch.as_tensor(whiten, dtype=torch.float64).to(path)
    drift = (whitened[..., :-1, :] * moved).sum(dim=(-2, -1))
    square = (whitened**2).sum(dim=-1)
    energy = ((square[..., :-1] + square[..., 1:]) / 2.0 * gaps).sum(dim=-1)
    return (drift - energy / 2.0) / process.eta
