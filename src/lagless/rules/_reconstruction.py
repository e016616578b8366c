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
    """

    coefficients: FloatArray
    weights: FloatArray
    residual: float


def reconstruct(
    stored: ArrayLike, wanted: ArrayLike, *, max_residual: float = 0.1, warn_residual: float = 0.01
) -> Reconstruction:
    """The combination of stored averages (or checkpoints) nearest to an unstored one.

        min_x ||x R - w||²   subject to   Σ x = 1

    Args:
        stored: R, shape (k, n): one weight row per stored thing over the same n steps. The row of a checkpoint is a
            unit vector, that of an average is its :func:`~lagless.trajectory_weights` at the step where it
            was stored.
        wanted: w, shape (n,): the weights of the rule that is wanted.
        max_residual: refuse above this relative residual, > 0. ``math.inf`` never refuses.
        warn_residual: warn above this one.

    Returns:
        Coefficients, the weights they realise, and the relative residual.

    Raises:
        ValueError: if shapes disagree, a row does not sum to 1, or the residual exceeds ``max_residual``.

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
    for label, sums in (("stored row", rows.sum(axis=1)), ("wanted", target.sum(keepdims=True))):
        if not np.allclose(sums, 1.0, rtol=0.0, atol=1e-6):
            raise ValueError(f"{label} does not sum to 1 (sums: {sums}); weight rows of averages and checkpoints do.")

    # Σx = 1 is built in by measuring everything from the first row.
    free, *_ = np.linalg.lstsq((rows[1:] - rows[0]).T, target - rows[0], rcond=None)
    coefficients = np.concatenate([[1.0 - free.sum()], free])
    realised = coefficients @ rows
    residual = float(np.linalg.norm(realised - target) / np.linalg.norm(target))
    if not residual <= max_residual:
        raise ValueError(
            f"the stored averages cannot express the wanted one: relative residual {residual:.3g}, allowed "
            f"{max_residual:g}. Store more averages of neighbouring widths, or raise max_residual to accept it."
        )
    if residual > warn_residual:
        warnings.warn(
            f"reconstruction leaves a relative residual of {residual:.3g}: that is how far off its weights are.",
            stacklevel=2,
        )
    return Reconstruction(coefficients, realised, residual)
