"""Which weights are allowed, and the minimum of a quadratic function among them."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag, cholesky, solve_triangular
from scipy.optimize import nnls

Floats = NDArray[np.float64]
Mode = Literal["free", "convex", "decay"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""``"free"``: Σ w = 1, of any sign. ``"convex"``: w ≥ 0 as well, which is to say that the schedule that the weights
equal never rises. ``"decay"``: moreover nothing on θ_0, so that the schedule begins at 1: what a trainer could have
run."""

_POSITIVE = 1e-12  # relative to the largest eigenvalue; keeps singular problems solvable
_FEASIBLE = 1e-9


def is_feasible(weights: Floats, mode: Mode, groups: int = 1) -> bool:
    """Tell whether weights fit a mode.

    >>> is_feasible(np.array([0.5, 0.5]), "convex"), is_feasible(np.array([0.5, 0.5]), "decay")
    (True, False)
    """
    rows = weights.reshape(groups, -1)
    if mode == "decay" and np.abs(rows[:, 0]).max() > _FEASIBLE:
        return False
    return bool(np.abs(rows.sum(axis=1) - 1.0).max() <= _FEASIBLE and (mode == "free" or rows.min() >= -_FEASIBLE))


def minimum(hessian: Floats, linear: Floats, mode: Mode, groups: int = 1) -> Floats:
    """Return the weights that minimise ½ wᵀHw - qᵀw among those that a mode allows.

    Σ w = 1 leaves w = w_0 + Zv with ZᵀHZ = LLᵀ, and the minimum w_free over all v in closed form. With u = Lᵀv measured
    from there and G = ZL⁻ᵀ the function is ½|u|² up to a constant, so that w ≥ 0 asks for the shortest u with
    Gu ≥ -w_free. Non-negative least squares finds it exactly: its matrix is (Gᵀ; -w_freeᵀ), its target (0, 1), and u
    its residual up to a factor.

    Args:
        hessian: H, shape (GN, GN), positive semi-definite up to rounding.
        linear: q, shape (GN,).
        mode: which weights are allowed.
        groups: G; in each the N weights sum to 1.

    Reference:
        C. L. Lawson, R. J. Hanson, Solving Least Squares Problems (1974), chapter 23.
    """
    if mode == "decay":
        kept = np.arange(len(linear)).reshape(groups, -1)[:, 1:].ravel()
        found = np.zeros(len(linear))
        found[kept] = minimum(hessian[np.ix_(kept, kept)], linear[kept], "convex", groups)
        return found
    count = len(linear) // groups
    if count == 1:
        return np.ones(len(linear))
    values, axes = np.linalg.eigh((hessian + hessian.T) / 2.0)
    floor = _POSITIVE * max(float(values[-1]), np.finfo(np.float64).tiny / _POSITIVE)
    hessian = (axes * np.maximum(values, floor)) @ axes.T
    start, basis = np.full(len(linear), 1.0 / count), np.kron(np.eye(groups), _sum_zero(count))
    factor = cholesky(basis.T @ hessian @ basis, lower=True)
    moves = solve_triangular(factor, basis.T, lower=True).T
    found = start + moves @ (moves.T @ (linear - hessian @ start))
    if mode == "convex":
        found = _nearest(found, moves)
    rows = found.reshape(groups, count)
    return (rows / rows.sum(axis=1, keepdims=True)).ravel()


def _nearest(free: Floats, moves: Floats) -> Floats:
    """``free`` + ``moves`` u ≥ 0 with the shortest u."""
    lengths = np.linalg.norm(moves, axis=1)
    beyond = -free / lengths
    farthest = float(beyond.max())
    if farthest <= 0.0:
        return free
    system = np.vstack([(moves / lengths[:, None]).T, beyond / farthest])
    target = np.append(np.zeros(moves.shape[1]), 1.0)
    active, _ = nnls(system, target, maxiter=30 * len(free))
    residual = system @ active - target
    found = free - moves @ (residual[:-1] / residual[-1] * farthest)
    return np.where(active > 0.0, 0.0, np.maximum(found, 0.0))


def _sum_zero(count: int) -> Floats:
    """An orthonormal basis of the vectors whose elements sum to 0, as columns."""
    return np.linalg.qr(np.column_stack([np.ones(count), np.eye(count)[:, :-1]]))[0][:, 1:]


def degrees_of_freedom(hessian: Floats, weights: Floats, mode: Mode, ridge: float, groups: int = 1) -> float:
    """Return the effective number of weights that were fitted: tr[P(H + λ)⁻¹PH], P onto the moves that are allowed.

    Args:
        hessian: H of the loss, shape (N, N).
        weights: where; those that a constraint holds at 0 are not free.
        mode: which weights are allowed.
        ridge: λ.
        groups: G; in each the weights sum to 1.

    Reference:
        T. Hastie, R. Tibshirani, J. Friedman, The Elements of Statistical Learning (2009), eq. 3.50.

    >>> round(degrees_of_freedom(np.eye(4), np.full(4, 0.25), "free", 1.0), 6)
    1.5
    """
    moving = np.ones(len(weights), dtype=bool) if mode == "free" else weights > _FEASIBLE
    counts = [int(row.sum()) for row in moving.reshape(groups, -1)]
    if max(counts) < 2:
        return 0.0
    basis: Floats = np.asarray(block_diag(*[_sum_zero(count) for count in counts if count]))
    curvature = np.clip(np.linalg.eigvalsh(basis.T @ hessian[np.ix_(moving, moving)] @ basis), 0.0, None)
    return float((curvature / (curvature + ridge)).sum()) if ridge > 0.0 else float((curvature > 0.0).sum())
