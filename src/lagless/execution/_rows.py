"""Buffers of averages in memory: what they are stored as, how they are cut, how one of them moves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lagless.execution._rounding import Noise, stochastic_round_
from lagless.rules import InitialWeights, SnapshotBuffer


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


def apply_row(buffers: Sequence[list[Tensor]], row: RowUpdate, live: list[Tensor], noise: Noise) -> None:
    """Apply ``row`` in place, in float32 or wider.

    Args:
        buffers: pieces of every buffer, one device and dtype per list.
        row: which buffer moves, and how.
        live: the same pieces of the weights, on any device.
        noise: for buffers in bfloat16, which are rounded stochastically.
    """
    target = buffers[row.buffer]
    if row.keep == 0.0 and row.live == 1.0 and not row.others:
        torch._foreach_copy_(target, live)
        return
    device, dtype = target[0].device, torch.promote_types(target[0].dtype, torch.float32)
    live, value = _as(live, device, dtype), _as(target, device, dtype)
    if row.others:
        torch._foreach_mul_(value, row.keep)
        for other, weight in row.others:
            torch._foreach_add_(value, _as(buffers[other], device, dtype), alpha=weight)
        torch._foreach_add_(value, live, alpha=row.live)
    else:
        torch._foreach_lerp_(value, live, row.live)
    if value is not target:
        for into, v in zip(target, value, strict=True):
            stochastic_round_(into, v, noise.on(device))


def _as(tensors: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    if tensors[0].device == device and tensors[0].dtype == dtype:
        return tensors
    return [t.to(device, dtype) for t in tensors]
