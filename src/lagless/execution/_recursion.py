"""One block of the buffers of averages moved by one stored checkpoint, and one block of an average read from them.

Blocks begin at multiples of :data:`BLOCK` elements of each tensor, whoever calls, so that an element is always computed
by the same operations, and averages formed in one pass or over many days are the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lagless.execution._rounding import Noise
from lagless.execution._rows import RowUpdate, apply_row, buffer_dtype, combine

BLOCK = 1 << 16
"""Elements; the buffers of half a dozen rules stay in the cache of a core."""

_NOISE = Noise(0, 0)  # of averages in bfloat16, of which there are none here


def start_buffers(keys: Sequence[Hashable], live: Tensor, own: torch.dtype) -> list[Tensor]:
    """Return what every buffer holds before the first update: the first weights.

    Args:
        keys: what each buffer holds.
        live: a block of the first weights.
        own: the type in which weights are stored, which buffers of iterates keep.
    """
    return [live.to(buffer_dtype(key, own, None), copy=True) for key in keys]


def move_block(rows: Sequence[RowUpdate], buffers: Sequence[Tensor], live: Tensor) -> Tensor | None:
    """Move a block of every buffer by one step, in place.

    An element that the buffers and the weights have in common stays as it is, bit for bit, also where it is infinite.

    Args:
        rows: how buffers move, in an order that can be applied in place.
        buffers: one block each, of all buffers; only those that ``rows`` name are changed.
        live: the same block of the weights.

    Returns:
        The elements, counted from the block's first, at which the weights or an average are not finite and not an
        infinity that stays; None if there are none.
    """
    finite = math.isfinite(float(live.sum()))
    bad: Tensor | None = None
    for row in rows:
        target = buffers[row.buffer]
        inputs = [target, *(buffers[other] for other, _ in row.others)]
        same = _agree([*inputs, live]) if row.others or not finite else None
        apply_row([[buffer] for buffer in buffers], row, [live], _NOISE)
        if same is not None:
            torch.where(same, live.to(target.dtype), target, out=target)
        if not math.isfinite(float(target.sum())):
            found = ~torch.isfinite(target) & ~(
                same if same is not None else torch.zeros_like(target, dtype=torch.bool)
            )
            bad = found if bad is None else bad | found
    if not rows and not finite:
        bad = ~torch.isfinite(live) & ~(torch.isinf(live) & (buffers[0].to(live.dtype) == live))
    return bad.nonzero().view(-1) if bad is not None and bool(bad.any()) else None


def first_nan(live: Tensor) -> int | None:
    """Return the place of the first NaN in a block of the first weights; an infinity may be one that stays."""
    if math.isfinite(float(live.sum())):
        return None
    found = torch.isnan(live).nonzero()
    return int(found[0]) if len(found) else None


def read_block(terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return a block of an average: Σ weight · tensor, and where all tensors agree that value itself, bit for bit.

    Args:
        terms: the buffers and the live weights that count, each with its coefficient.
    """
    counted = [(tensor, weight) for tensor, weight in terms if weight != 0.0]
    value = combine(counted, torch.device("cpu"))
    if len(counted) > 1 and (same := _agree([tensor for tensor, _ in counted])) is not None:
        torch.where(same, counted[0][0].to(value.dtype), value, out=value)
    return value


def _agree(tensors: Sequence[Tensor]) -> Tensor | None:
    """Where all tensors have one value; None if nowhere."""
    first, *others = tensors
    same = first == others[-1]
    for other in others[:-1]:
        if not bool(same.any()):
            return None
        same &= first == other
    return same if bool(same.any()) else None
