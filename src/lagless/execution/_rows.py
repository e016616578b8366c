"""Buffers of averages in memory: what they are stored as, how they move, how an average is formed of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lagless.execution._foreach import foreach_add_, foreach_copy_, foreach_lerp_, foreach_mul_, foreach_zero_
from lagless.execution._low_bits import SMALL_GAIN, combine_low_, lerp_low_
from lagless.execution._rounding import Noise, stochastic_round_
from lagless.rules import InitialWeights, SnapshotBuffer, UpdateCoefficients


class RowUpdate(NamedTuple):
    """``b ← keep·b + Σ_j weight_j b_j + live·θ`` for one buffer; ``others`` are pairs (j, weight_j)."""

    buffer: int
    keep: float
    others: tuple[tuple[int, float], ...]
    live: float


def buffer_dtype(label: Hashable, own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a buffer is stored as.

    Iterates (θ_0, snapshots) keep the parameters' dtype, which loses nothing; averages have the one that is wanted.

    Args:
        label: what the buffer holds.
        own: the parameter's dtype.
        wanted: of averages; None for float32, or the parameter's own where that is wider.
    """
    return (
        own if isinstance(label, InitialWeights | SnapshotBuffer) else wanted or torch.promote_types(own, torch.float32)
    )


def is_small(row: RowUpdate) -> bool:
    """Whether the average moves by so little that float32 alone would lose part of it."""
    return 1.0 - SMALL_GAIN < row.keep < 1.0


def update_rows(update: UpdateCoefficients, index: Sequence[int] | None = None) -> list[RowUpdate]:
    """Return the rows of ``b ← M b + v θ`` that do anything, in the order in which they can be applied in place.

    Args:
        update: M and v of a rule.
        index: which buffer each of the rule's own is; None for its own order.
    """
    index = range(len(update.live)) if index is None else index
    rows: list[RowUpdate] = []
    for i, (matrix_row, live) in enumerate(zip(update.matrix, update.live, strict=True)):
        others = tuple((index[j], w) for j, w in enumerate(matrix_row) if w != 0.0 and j != i)
        if others or live != 0.0 or matrix_row[i] != 1.0:
            rows.append(RowUpdate(index[i], matrix_row[i], others, live))
    return in_place_order(rows)


def in_place_order(rows: Iterable[RowUpdate]) -> list[RowUpdate]:
    """Return rows in an order in which each reads the others' values of before: a buffer moves after all its readers.

    That is from the last buffer to the first, unless a row reads a later buffer than its own, as where rules that share
    buffers list them differently.

    Raises:
        ValueError: if rows read each other in a circle.
    """
    waiting = sorted(rows, key=lambda row: row.buffer, reverse=True)
    if all(other < row.buffer for row in waiting for other, _ in row.others):
        return waiting
    ordered: list[RowUpdate] = []
    while waiting:
        read = {other for row in waiting for other, _ in row.others}
        free = next((row for row in waiting if row.buffer not in read), None)
        if free is None:
            raise ValueError(f"buffers {sorted(row.buffer for row in waiting)} read each other; M must be triangular.")
        waiting.remove(free)
        ordered.append(free)
    return ordered


def combine(
    terms: Iterable[tuple[Tensor, float]], device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return Σ weight · tensor as a new tensor; terms of weight 0 are left out, and one of weight 1 is a copy of bits.

    Args:
        terms: an average's buffers and the live weights, each with its coefficient; not all of them 0.
        device: of the result; None for the first term's.
        dtype: of the sum; None for float32, or the first term's dtype where that is wider.
    """
    (first, weight), *others = [(tensor, weight) for tensor, weight in terms if weight != 0.0]
    device = first.device if device is None else device
    dtype = torch.promote_types(first.dtype, torch.float32) if dtype is None else dtype
    total = first.to(device, dtype, copy=True)
    if weight != 1.0:
        total.mul_(weight)
    for tensor, weight in others:
        total.add_(tensor.to(device, dtype), alpha=weight)
    return total


def apply_row(
    buffers: Sequence[list[Tensor]],
    row: RowUpdate,
    live: list[Tensor],
    noise: Noise,
    low: list[Tensor] | None = None,
) -> None:
    """Apply ``row`` in place, in float32 or wider.

    Args:
        buffers: pieces of every buffer, one device and dtype per list.
        row: which buffer moves, and how.
        live: the same pieces of the weights, on any device.
        noise: for buffers in bfloat16, which are rounded stochastically.
        low: what the rounding of the buffer, in float32, has cut off, if that is kept; it is updated in a small row and
            0 after any other, which leaves the bits of ``torch.lerp``.
    """
    target = buffers[row.buffer]
    if low and not is_small(row):
        foreach_zero_(low)
    if row.keep == 0.0 and row.live == 1.0 and not row.others:
        foreach_copy_(target, live)
        return
    device, dtype = target[0].device, torch.promote_types(target[0].dtype, torch.float32)
    live, value = _as(live, device, dtype), _as(target, device, dtype)
    if low and is_small(row):
        if row.others:
            others = [(_as(buffers[other], device, dtype), weight) for other, weight in row.others]
            combine_low_(target, low, row.keep, [*others, (live, row.live)])
        else:
            lerp_low_(target, low, live, row.live)
        return
    if row.others:
        foreach_mul_(value, row.keep)
        for other, weight in row.others:
            foreach_add_(value, _as(buffers[other], device, dtype), alpha=weight)
        foreach_add_(value, live, alpha=row.live)
    else:
        foreach_lerp_(value, live, row.live)
    if value is not target:
        for into, v in zip(target, value, strict=True):
            stochastic_round_(into, v, noise.on(device))


def _as(tensors: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    if tensors[0].device == device and tensors[0].dtype == dtype:
        return tensors
    return [t.to(device, dtype) for t in tensors]
