"""Symmetric positive definite matrices: reading them, and their square roots."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from lagless.rules import FloatArray


def point_and_matrices(
    points: Mapping[str, ArrayLike], matrices: Mapping[str, ArrayLike]
) -> tuple[list[FloatArray], list[FloatArray]]:
    """Points of shape (d,) and symmetric positive definite matrices of shape (d, d) that agree in d.

    Numbers stand for constant points and for multiples of the identity; d comes from the arguments that are not
    numbers, and is 1 if all are.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    given = {name: np.asarray(value, dtype=np.float64) for name, value in {**points, **matrices}.items()}
    dimension = next((value.shape[0] for value in given.values() if value.ndim), 1)
    for name, value in given.items():
        wanted = (dimension,) if name in points else (dimension, dimension)
        if value.ndim and value.shape != wanted:
            raise ValueError(f"{name} has shape {value.shape}; it must have shape {wanted} or be a number.")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} has entries that are not finite.")
    return (
        [np.broadcast_to(given[name], (dimension,)).copy() for name in points],
        [positive_definite(name, given[name], dimension) for name in matrices],
    )


def positive_definite(name: str, value: ArrayLike, dimension: int) -> FloatArray:
    """``value`` as a matrix of shape (d, d); a number a stands for aI.

    Raises:
        ValueError: if the shape disagrees or it is not symmetric positive definite.
    """
    matrix = np.asarray(value, dtype=np.float64)
    matrix = float(matrix) * np.eye(dimension) if matrix.ndim == 0 else matrix
    if matrix.shape != (dimension, dimension):
        raise ValueError(
            f"{name} has shape {matrix.shape}; it must have shape {(dimension, dimension)} or be a number."
        )
    scale = np.abs(matrix).max()
    if not np.abs(matrix - matrix.T).max() <= 1e-10 * scale:
        raise ValueError(f"{name} is not symmetric; give a symmetric positive definite matrix.")
    matrix = (matrix + matrix.T) / 2.0
    smallest = float(np.linalg.eigvalsh(matrix)[0])
    if not smallest > 0.0:
        raise ValueError(f"{name} has the eigenvalue {smallest:g}; it must be symmetric positive definite.")
    return matrix


def square_root(matrix: FloatArray) -> FloatArray:
    """The symmetric square root of a positive semidefinite matrix; eigenvalues below 0 by rounding count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def inverse(matrix: FloatArray) -> FloatArray:
    """The inverse, float64."""
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def op_norm(matrix: FloatArray) -> float:
    """The largest singular value."""
    return float(np.linalg.norm(matrix, 2))


def commute(first: FloatArray, second: FloatArray) -> bool:
    """Whether AB = BA, to 1e-10 of ‖A‖‖B‖."""
    gap = op_norm(first @ second - second @ first)
    return gap <= 1e-10 * op_norm(first) * op_norm(second)


def check_positive(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        ValueError: if it is not finite and > 0.
    """
    if not 0.0 < value < np.inf:
        raise ValueError(f"{name}={value!r}; it must be a finite number > 0.")
    return float(value)


def check_time(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        ValueError: if it is not finite and ≥ 0.
    """
    if not 0.0 <= value < np.inf:
        raise ValueError(f"{name}={value!r}; it must be a finite number >= 0.")
    return float(value)


def check_fraction(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        ValueError: if it is not in (0, 1).
    """
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name}={value!r}; it must lie in (0, 1).")
    return float(value)


def check_tau(tau: float, horizon: float) -> None:
    """Require 0 < τ < T.

    Raises:
        ValueError: if it is not so, or T is not finite.
    """
    check_positive("horizon", horizon)
    if not check_positive("tau", tau) < horizon:
        raise ValueError(f"tau={tau}; it must be less than the horizon, {horizon}.")
