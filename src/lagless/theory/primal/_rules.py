"""Mean and covariance of primal averaging under any averaging rule, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lagless._validation import require_integer, require_number
from lagless.rules import FloatArray, ReadCoefficients, Rule, read_after


class PrimalMoments(NamedTuple):
    """Moments after a run, in every coordinate.

    Attributes:
        live_mean: E z, shape (d,).
        live_variance: Var z, shape (d,).
        mean: E x, of the average as it is read, shape (d,).
        variance: Var x, shape (d,).
    """

    live_mean: FloatArray
    live_variance: FloatArray
    mean: FloatArray
    variance: FloatArray


def primal_moments(
    rule: Rule,
    curvatures: ArrayLike,
    noise: ArrayLike,
    steps: int,
    *,
    lr: float,
    interpolation: float | Callable[[int], float] = 0.9,
    pull: float = 0.0,
    distance: ArrayLike = 1.0,
) -> PrimalMoments:
    """Return the exact moments of ``PrimalAveraging(SGD(lr), rule)`` on a quadratic with its minimum at 0.

    A coordinate of curvature h has gradients h·y + ς·ξ, ξ ~ N(0, 1). Its state (z, buffers of the rule) obeys a
    linear recursion with the rule's coefficients at every step, so mean and covariance do too.

    Args:
        rule: of the average.
        curvatures: h > 0, shape (d,).
        noise: ς ≥ 0, a number or shape (d,).
        steps: T ≥ 1.
        lr: η > 0.
        interpolation: m in [0, 1], or a function of the step (1-based).
        pull: p in [0, 1], at update steps of the average.
        distance: z_0, a number or shape (d,).

    Raises:
        ValueError: if an argument is out of range, or the rule has had no update in so many steps.

    >>> from lagless import EMA
    >>> moments = primal_moments(EMA(decay=0.9), [0.1, 1.0], 1.0, 300, lr=0.2, interpolation=0.5)
    >>> [round(float(v), 4) for v in moments.variance]
    [0.9179, 0.0529]
    """
    require_integer("steps", steps, minimum=1)
    require_number("lr", lr, above=0.0, finite=True)
    require_number("pull", pull, minimum=0.0, maximum=1.0)
    h, spread, start = coordinates(curvatures, noise, distance)
    size, schedule = len(rule.buffer_keys), rule.schedule
    mean = np.repeat(start[:, None], 1 + size, axis=1)
    covariance = np.zeros((len(h), 1 + size, 1 + size))
    injected = (lr * spread) ** 2
    live = np.eye(1 + size)[0]
    for t in range(1, steps + 1):
        m = interpolation(t) if callable(interpolation) else interpolation
        require_number("interpolation", m, minimum=0.0, maximum=1.0)
        y = (1.0 - m) * live + m * _target(rule, t)
        step = np.repeat(np.eye(1 + size)[None], len(h), axis=0)
        step[:, 0] -= (lr * h)[:, None] * y
        mean, covariance = _apply(step, mean, covariance)
        covariance[:, 0, 0] += injected
        if (moves := _moves(rule, t)) is not None:
            mean, covariance = _apply(moves, mean, covariance)
        if pull and t > rule.update_after and schedule.updates(t):
            towards = np.eye(1 + size)
            towards[0] += pull * (_target(rule, t + 1) - live)
            mean, covariance = _apply(towards, mean, covariance)
    read = read_after(rule, schedule.last(steps), steps)
    if read is None:
        raise ValueError(f"steps={steps}; {rule} has had no update by then, so there is no average.")
    row = _row(read)
    variance = np.einsum("i,dij,j->d", row, covariance, row)
    return PrimalMoments(mean[:, 0], covariance[:, 0, 0], mean @ row, variance)


def coordinates(curvatures: ArrayLike, noise: ArrayLike, distance: ArrayLike) -> tuple[FloatArray, ...]:
    """Return curvatures, noise and distances as arrays of shape (d,).

    Raises:
        ValueError: if one has another shape or is out of range.
    """
    h = np.atleast_1d(np.asarray(curvatures, dtype=np.float64))
    if h.ndim != 1 or not h.size or not (np.isfinite(h) & (h > 0.0)).all():
        raise ValueError(f"curvatures={curvatures!r}; they must be finite numbers > 0, shape (d,).")
    found = [h]
    for name, given, least in (("noise", noise, 0.0), ("distance", distance, -np.inf)):
        values = np.asarray(given, dtype=np.float64)
        if values.shape not in ((), h.shape) or not (np.isfinite(values) & (values >= least)).all():
            bound = " >= 0" if least == 0.0 else ""
            raise ValueError(f"{name}={given!r}; it must be finite{bound}, a number or of shape {h.shape}.")
        found.append(np.broadcast_to(values, h.shape).copy())
    return tuple(found)


def _row(read: ReadCoefficients) -> FloatArray:
    """Return coefficients of (live weights, buffers)."""
    return np.array([read.live, *read.buffers])


def _target(rule: Rule, step: int) -> FloatArray:
    """Return x before ``step`` in terms of (z, buffers): the first buffer until there was an update."""
    last = rule.schedule.last(step - 1)
    if step > rule.update_after and last.number:
        return _row(rule.read(last))
    return np.eye(1 + len(rule.buffer_keys))[1]


def _moves(rule: Rule, step: int) -> FloatArray | None:
    """Return what ``step`` does to (z, buffers) after the optimizer; None where the average rests."""
    schedule = rule.schedule
    matrix = np.eye(1 + len(rule.buffer_keys))
    if step <= rule.update_after:
        matrix[1:] = matrix[0]
        return matrix
    if not schedule.updates(step):
        return None
    update = rule.update(schedule.tick_at(step))
    matrix[1:] = np.column_stack([update.live, np.array(update.matrix)])
    return matrix


def _apply(matrix: FloatArray, mean: FloatArray, covariance: FloatArray) -> tuple[FloatArray, FloatArray]:
    moved = np.einsum("...ij,...j->...i", matrix, mean)
    return moved, matrix @ covariance @ np.swapaxes(matrix, -1, -2)
