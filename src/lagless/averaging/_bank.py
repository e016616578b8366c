"""The distinct buffers of all rules over one set of tensors, and their update in one pass over the live weights.

The update is bound by memory traffic. Tensors are cut into blocks that stay in cache, and every buffer's update of a
block is done before the next block is touched: the live weights are read from memory once for all rules. Compiled, the
averages of a large tensor are updated by one kernel instead.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lagless.averaging import _fused
from lagless.averaging._rounding import stochastic_round_
from lagless.rules import Snapshot, Start

# Elements. On CPUs 4 MiB of float32 stay in a shared cache and are large enough to hide the cost of a call; elsewhere
# a launch costs more than reading the live weights again.
_CPU_BLOCK, _BLOCK = 1 << 20, 1 << 26


class RowUpdate(NamedTuple):
    """``b ← keep·b + Σ_j weight_j b_j + live·θ`` for one buffer; ``others`` are pairs (j, weight_j)."""

    buffer: int
    keep: float
    others: tuple[tuple[int, float], ...]
    live: float


@dataclass(frozen=True)
class _Block:
    """Pieces of the live tensors and the same pieces of every buffer."""

    live: list[Tensor]
    buffers: list[list[Tensor]]
    whole: bool = False  # one large tensor, for a compiled kernel


class Bank:
    """Buffers, each a list of tensors like the live ones and starting as their copy.

    Buffers that hold iterates (θ_0, snapshots) keep the parameters' dtype, which loses nothing; averages have
    ``dtype``.

    Args:
        live: the live tensors.
        labels: what each buffer holds.
        dtype: of averages; None for float32, or the parameters' own where that is wider. bfloat16 is rounded
            stochastically.
        device: of all buffers; None for each live tensor's own.
        seed: of the rounding noise.
        compile: update the averages of large tensors by one compiled kernel.
        absent: labels that get no storage here.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        labels: Sequence[Hashable],
        *,
        dtype: torch.dtype | None,
        device: torch.device | None,
        seed: int,
        compile: bool = False,
        absent: Collection[Hashable] = (),
    ) -> None:
        self.seed = seed
        self._compile = compile
        self.buffers: list[list[Tensor]] = []
        for label in labels:
            holds_iterate = isinstance(label, Start | Snapshot)
            kinds = [t.dtype if holds_iterate else dtype or torch.promote_types(t.dtype, torch.float32) for t in live]
            copies = [torch.empty_like(t, dtype=k, device=device).copy_(t) for t, k in zip(live, kinds, strict=True)]
            self.buffers.append([] if label in absent else copies)
        self._blocks: list[_Block] = []
        self._addresses: list[int] = []

    def update(self, live: Sequence[Tensor], rows: Sequence[RowUpdate], step: int) -> None:
        """Apply ``rows`` in the given order: one that reads another buffer's old value comes before that one's own."""
        addresses = [t.data_ptr() for t in live]
        if addresses != self._addresses:
            self._blocks, self._addresses = _cut(live, self.buffers, self._compile), addresses
        noise = _Noise(self.seed, step)
        for block in self._blocks:
            _update(block, rows, noise)


class _Noise:
    """One generator per device, seeded by (seed, step): a resumed run draws the same noise, and nothing is stored."""

    def __init__(self, seed: int, step: int) -> None:
        self._seed = (seed * 0x9E3779B97F4A7C15 + step) % 2**63
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _cut(live: Sequence[Tensor], buffers: Sequence[Sequence[Tensor]], compile: bool) -> list[_Block]:
    """Blocks that cover all tensors; within a block, device and dtype of the live pieces are one."""
    blocks: list[_Block] = []
    room, kind = 0, None
    for index in sorted(range(len(live)), key=lambda i: (str(live[i].device), str(live[i].dtype))):
        tensor, own = live[index], [b[index : index + 1] for b in buffers]
        size = _CPU_BLOCK if tensor.device.type == "cpu" else _BLOCK
        whole = compile and tensor.is_contiguous() and tensor.numel() >= _fused.SMALLEST
        pieces = [tensor]
        if tensor.is_contiguous():
            size = max(tensor.numel(), 1) if whole else size
            pieces = list(tensor.view(-1).split(size))
            own = [list(b[0].view(-1).split(size)) if b else [] for b in own]
        for n, piece in enumerate(pieces):
            if whole or room < piece.numel() or kind != (piece.device, piece.dtype):
                blocks.append(_Block([], [[] for _ in buffers], whole))
                room, kind = 0 if whole else size, (piece.device, piece.dtype)
            room -= piece.numel()
            blocks[-1].live.append(piece)
            for into, column in zip(blocks[-1].buffers, own, strict=True):
                into.extend(column[n : n + 1])
    return blocks


def _update(block: _Block, rows: Sequence[RowUpdate], noise: _Noise) -> None:
    fused = [row for row in rows if block.whole and _is_lerp(row) and _fits(block, row)]
    for row in rows:
        if row not in fused:
            _update_row(block, row, noise)
    if fused:
        gains = torch.tensor([row.live for row in fused], device=block.live[0].device)
        _fused.lerp_all(block.live[0], [block.buffers[row.buffer][0] for row in fused], gains)


def _is_lerp(row: RowUpdate) -> bool:
    return not row.others and row.keep > 0.0


def _fits(block: _Block, row: RowUpdate) -> bool:
    target = block.buffers[row.buffer][0]
    return target.dtype != torch.bfloat16 and target.device == block.live[0].device


def _update_row(block: _Block, row: RowUpdate, noise: _Noise) -> None:
    target = block.buffers[row.buffer]
    if row.keep == 0.0 and row.live == 1.0 and not row.others:
        torch._foreach_copy_(target, block.live)
        return
    device, dtype = target[0].device, torch.promote_types(target[0].dtype, torch.float32)
    live, value = _as(block.live, device, dtype), _as(target, device, dtype)
    if row.others:
        torch._foreach_mul_(value, row.keep)
        for other, weight in row.others:
            torch._foreach_add_(value, _as(block.buffers[other], device, dtype), alpha=weight)
        torch._foreach_add_(value, live, alpha=row.live)
    else:
        torch._foreach_lerp_(value, live, row.live)
    if value is not target:
        for into, v in zip(target, value, strict=True):
            stochastic_round_(into, v, noise.on(device))


def _as(pieces: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    if pieces[0].device == device and pieces[0].dtype == dtype:
        return pieces
    return [p.to(device, dtype) for p in pieces]
