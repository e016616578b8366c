"""Averages nobody stored, from those somebody did: a least-squares combination in weight space."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lagless.rules._filter import FloatArray


@dataclass(frozen=True)
class Reconstruction:
    """A combination ``x`` of stored averages that stands in for another one.

    Attributes:
        coefficients: shape (k,), x; sums to 1. The reconstructed average is Σ_j x_j (stored average j).
        weights: shape (n,), xR, the weight that combination puts on every iterate.
        residual: ||xR - w|| / ||w||. If iterates carry independent noise, the error of the combination relative to
            the noise left in the wanted average.
        amplification: Σ|x|, at least 1. Rounding errors of the stored averages enter the combination up to so many
            times: with float32 files, and weights of size 1, up to 6e-8 · amplification.
    """

    coefficients: FloatArray
    weights: FloatArray
    residual: float
    amplification: float


def reconstruct(
    stored: ArrayLike,
    wanted: ArrayLike,
    *,
    max_residual: float = 0.1,
    warn_residual: float = 0.01,
    max_amplification: float = 1000.0,
    ridge: float = 0.0,
) -> Reconstruction:
    """Return the combination of stored averages (or checkpoints) nearest to an unstored one.

        min_x ||x R - w||² + λ² ||w||² ||x||²   subject to   Σ x = 1

    Averages of nearly equal widths are nearly the same row of R. An exact combination of them then has coefficients
    of many millions and opposite signs: right on paper, and noise when what is stored has been rounded.

    Args:
        stored: R, shape (k, n): one weight row per stored thing over the same n steps. The row of a checkpoint is a
            unit vector, that of an average is its :func:`~lagless.trajectory_weights` at the step where it
            was stored.
        wanted: w, shape (n,): the weights of the rule that is wanted.
        max_residual: refuse above this relative residual, > 0. ``math.inf`` never refuses.
        warn_residual: warn above this one.
        max_amplification: refuse coefficients with Σ|x| above this, ≥ 1. The default loses at most 6e-5 of a weight
            to float32 files, and all of it to bfloat16 ones, for which 10 is a better limit.
        ridge: λ ≥ 0. Larger gives smaller coefficients and a larger residual.

    Returns:
        Coefficients, the weights they realise, the relative residual, and the amplification of rounding.

    Raises:
        ValueError: if shapes disagree, a row does not sum to 1, an argument is out of range, or the residual or the
            amplification exceeds its limit.

    Reference:
        Karras et al. (2024), arXiv 2312.02696, App. C (post-hoc EMA), for one family of profiles; here for any affine
        rule and any spacing.

    >>> from lagless import EMA, trajectory_weights
    >>> steps = range(101)
    >>> stored = [trajectory_weights(EMA(half_life=h), steps) for h in (8, 12, 16, 20)]
    >>> r = reconstruct(stored, trajectory_weights(EMA(half_life=14), steps))
    >>> r.residual < 0.01, round(float(r.coefficients.sum()), 9)
    (True, 1.0)
    """
    rows = np.atleast_2d(np.asarray(stored, dtype=np.float64))
    target = np.asarray(wanted, dtype=np.float64)
    if rows.ndim != 2 or target.shape != rows.shape[1:]:
        raise ValueError(
            f"stored must have shape (k, n) and wanted (n,) over the same steps; got {rows.shape} and {target.shape}."
        )
    if not max_residual > 0.0:
        raise ValueError(f"max_residual={max_residual}; it must be > 0.")
    if not max_amplification >= 1.0:
        raise ValueError(f"max_amplification={max_amplification}; it must be at least 1, where coefficients sum to 1.")
    if not 0.0 <= ridge < np.inf:
        raise ValueError(f"ridge={ridge}; it must be >= 0 and finite.")
    for label, sums in (("stored row", rows.sum(axis=1)), ("wanted", target.sum(keepdims=True))):
        if not np.allclose(sums, 1.0, rtol=0.0, atol=1e-6):
            raise ValueError(f"{label} does not sum to 1 (sums: {sums}); weight rows of averages and checkpoints do.")

    # Σx = 1 is built in by measuring everything from the first row, and the ridge by rows that want x to be 0.
    penalty = ridge * _norm(target) * np.eye(len(rows))
    design, goal = np.hstack([rows, penalty]), np.concatenate([target, np.zeros(len(rows))])
    free = _least_squares((design[1:] - design[0]).T, goal - design[0])
    coefficients = np.concatenate([[1.0 - float(free.sum())], free])
    realised = coefficients @ rows
    residual = _norm(realised - target) / _norm(target)
    if not residual <= max_residual:
        raise ValueError(
            f"the stored averages cannot express the wanted one: relative residual {residual:.3g}, allowed "
            f"{max_residual:g}. Store more averages of neighbouring widths, or raise max_residual to accept it."
        )
    amplification = float(np.abs(coefficients).sum())
    if not amplification <= max_amplification:
        raise ValueError(
            f"the combination multiplies rounding errors of the stored averages by up to {amplification:.3g} (largest "
            f"coefficient {np.abs(coefficients).max():.3g}), allowed {max_amplification:g}. Pass a ridge, for example "
            "ridge=1e-3, leave out averages of nearly equal widths, or store averages that lie on both sides of the "
            "wanted width; raise max_amplification only for averages stored in float64."
        )
    if residual > warn_residual:
        warnings.warn(
            f"reconstruction leaves a relative residual of {residual:.3g}: that is how far off its weights are.",
            stacklevel=2,
        )
    return Reconstruction(coefficients, realised, residual, amplification)


def _norm(vector: FloatArray) -> float:
    return float(np.linalg.norm(vector))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _least_squares(design: FloatArray, goal: FloatArray) -> FloatArray:
    found: FloatArray = np.linalg.lstsq(design, goal, rcond=None)[0]  # pyright: ignore
    return found
