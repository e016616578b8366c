"""Which weights are allowed, and the minimum of a quadratic function among them."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import nnls

Floats = NDArray[np.float64]
Mode = Literal["free", "convex", "decay"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""``"free"``: Σ w = 1, of any sign. ``"convex"``: w ≥ 0 as well, which is to say that the schedule that the weights
equal never rises. ``"decay"``: moreover nothing on θ_0, so that the schedule begins at 1: what a trainer could have
run."""

_POSITIVE = 1e-12  # relative to the largest eigenvalue; keeps singular problems solvable
_FEASIBLE = 1e-9


def is_feasible(weights: Floats, mode: Mode) -> bool:
    """Tell whether weights fit a mode.

    >>> is_feasible(np.array([0.5, 0.5]), "convex"), is_feasible(np.array([0.5, 0.5]), "decay")
    (True, False)
    """
    if mode == "decay" and abs(weights[0]) > _FEASIBLE:
        return False
    return bool(abs(weights.sum() - 1.0) <= _FEASIBLE and (mode == "free" or weights.min() >= -_FEASIBLE))


def minimum(hessian: Floats, linear: Floats, mode: Mode) -> Floats:
    """Return the weights that minimise ½ wᵀHw - qᵀw among those that a mode allows.

    With Σ w = 1, the function is ½|Aw - y|² = ½|(A - y1ᵀ)w|² up to a constant, A the Cholesky factor of H and Ay = q.
    Over w ≥ 0 that is the point of a simplex nearest to 0, which non-negative least squares finds exactly: its target
    is (0, 1), its matrix (A - y1ᵀ; 1ᵀ), its solution proportional to w.

    Args:
        hessian: H, shape (N, N), positive semi-definite up to rounding.
        linear: q, shape (N,).
        mode: which weights are allowed.
    """
    if mode == "decay":
        return np.concatenate([[0.0], minimum(hessian[1:, 1:], linear[1:], "convex")])
    count = len(linear)
    values, axes = np.linalg.eigh((hessian + hessian.T) / 2.0)
    floor = _POSITIVE * max(float(values[-1]), np.finfo(np.float64).tiny / _POSITIVE)
    hessian = (axes * np.maximum(values, floor)) @ axes.T
    if mode == "free":
        ones = np.ones(count)
        solved = np.linalg.solve(hessian, np.stack([linear, ones], axis=1))
        found = solved[:, 0] + solved[:, 1] * (1.0 - solved[:, 0].sum()) / solved[:, 1].sum()
    else:
        factor = cholesky(hessian, lower=True)
        target = solve_triangular(factor, linear, lower=True)
        system = factor.T - target[:, None]
        system /= max(float(np.linalg.norm(system, axis=0).min()), np.finfo(np.float64).tiny)
        found, _ = nnls(np.vstack([system, np.ones(count)]), np.append(np.zeros(count), 1.0), maxiter=30 * count)
    return found / found.sum()


def degrees_of_freedom(hessian: Floats, weights: Floats, mode: Mode, ridge: float) -> float:
    """Return the effective number of weights that were fitted: tr[P(H + λ)⁻¹PH], P onto the moves that are allowed.

    Args:
        hessian: H of the loss, shape (N, N).
        weights: where; those that a constraint holds at 0 are not free.
        mode: which weights are allowed.
        ridge: λ.

    Reference:
        T. Hastie, R. Tibshirani, J. Friedman, The Elements of Statistical Learning (2009), eq. 3.50.

    >>> round(degrees_of_freedom(np.eye(4), np.full(4, 0.25), "free", 1.0), 6)
    1.5
    """
    moving = np.ones(len(weights), dtype=bool) if mode == "free" else weights > _FEASIBLE
    count = int(moving.sum())
    if count < 2:
        return 0.0
    basis = np.linalg.qr(np.column_stack([np.ones(count), np.eye(count)[:, :-1]]))[0][:, 1:]
    curvature = np.clip(np.linalg.eigvalsh(basis.T @ hessian[np.ix_(moving, moving)] @ basis), 0.0, None)
    return float((curvature / (curvature + ridge)).sum()) if ridge > 0.0 else float((curvature > 0.0).sum())
