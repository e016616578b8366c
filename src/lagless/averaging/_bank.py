"""The distinct buffers of all rules over one set of tensors, and their update in one pass over the live weights.

The update is bound by memory traffic. Tensors are cut into blocks that stay in cache, and every buffer's update of a
block is done before the next block is touched: the live weights are read from memory once for all rules. Compiled, the
averages of a large tensor are updated by one kernel instead. Buffers on the host follow an accelerator in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lagless.averaging import _fused
from lagless.averaging._offload import Offload, can_overlap
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


@dataclass
class _Block:
    """Pieces of live tensors and the same pieces of every buffer; one device and dtype per list.

    Attributes:
        live: pieces of the live tensors.
        buffers: for each buffer, its pieces; none for a buffer that is kept elsewhere.
        whole: whether this is one large tensor, for a compiled kernel.
    """

    live: list[Tensor] = field(default_factory=list)
    buffers: list[list[Tensor]] = field(default_factory=list)
    whole: bool = False


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
        self._device = device
        self._compile = compile
        self._offload: Offload | None = None
        self._buffers: list[list[Tensor]] = []
        for label in labels:
            holds_iterate = isinstance(label, Start | Snapshot)
            self._buffers.append([])
            for tensor in () if label in absent else live:
                kind = tensor.dtype if holds_iterate else dtype or torch.promote_types(tensor.dtype, torch.float32)
                self._buffers[-1].append(torch.empty_like(tensor, dtype=kind, device=device).copy_(tensor))

    @property
    def buffers(self) -> list[list[Tensor]]:
        """One list of tensors per label, after the updates given so far."""
        self.wait()
        return self._buffers

    def update(self, live: Sequence[Tensor], rows: Sequence[RowUpdate], step: int) -> None:
        """Apply ``rows`` in the given order: one that reads another buffer's old value comes before that one's own.

        If the buffers are on the host and live tensors on an accelerator, this is only begun here.
        """
        if self._device is None:
            self._follow_devices(live)
        noise = _Noise(self.seed, step)
        if self._device is not None and self._device.type == "cpu" and any(can_overlap(t.device) for t in live):
            self._offload = self._offload or Offload()
            blocks = _cut(live, self._buffers, staged=True, compile=self._compile)
            largest = _CPU_BLOCK * max(t.element_size() for t in live)
            self._offload.start(live, ((block.live, _updating(block, rows, noise)) for block in blocks), largest)
            return
        # A single average reads the live weights once in any case: cutting would only cost calls, except that it keeps
        # converted copies small.
        converts = any(t.dtype != b[i].dtype for b in self.buffers if b for i, t in enumerate(live))
        for block in _cut(live, self.buffers, share=converts or len(rows) > 1, compile=self._compile):
            _update(block, rows, noise)

    def wait(self) -> None:
        """Until every update that was begun has ended.

        Raises:
            RuntimeError: if one has failed.
        """
        if self._offload is not None:
            self._offload.wait()

    def _follow_devices(self, live: Sequence[Tensor]) -> None:
        for buffer in self._buffers:
            for i, tensor in enumerate(buffer):
                if tensor.device != live[i].device:
                    buffer[i] = tensor.to(live[i].device)


class _Noise:
    """One generator per device, seeded by (seed, step): a resumed run draws the same noise, and nothing is stored."""

    def __init__(self, seed: int, step: int) -> None:
        self._seed = (seed * 0x9E3779B97F4A7C15 + step) % 2**63
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _cut(
    live: Sequence[Tensor],
    buffers: Sequence[Sequence[Tensor]],
    *,
    share: bool = False,
    staged: bool = False,
    compile: bool = False,
) -> Iterator[_Block]:
    """Blocks that cover all tensors, in an order that depends on their kinds and sizes alone.

    Args:
        live: the live tensors.
        buffers: the buffers; an empty one is kept elsewhere.
        share: whether blocks on CPUs should be small enough to stay in cache.
        staged: whether all blocks must be, because they pass through memory of the host.
        compile: give every large tensor, or piece of one that is staged, a block of its own.
    """
    columns = [(tensor, [b[i] if b else None for b in buffers]) for i, tensor in enumerate(live)]
    block, kind, room = _Block(), None, 0
    for tensor, own in sorted(columns, key=lambda column: str(_kind(*column))):
        flat = all(t is None or t.is_contiguous() for t in (tensor, *own))
        whole = compile and flat and tensor.numel() >= _fused.SMALLEST
        size = _CPU_BLOCK if staged or (share and tensor.device.type == "cpu") else _BLOCK
        size = tensor.numel() if whole and not staged else size
        parts = [None if t is None else _pieces(t, size, flat) for t in own]
        for n, piece in enumerate(_pieces(tensor, size, flat)):
            if whole or room < piece.numel() or kind != _kind(tensor, own):
                if block.live:
                    yield block
                block, kind, room = _Block([], [[] for _ in buffers], whole), _kind(tensor, own), 0 if whole else size
            room -= piece.numel()
            block.live.append(piece)
            for into, part in zip(block.buffers, parts, strict=True):
                if part is not None:
                    into.append(part[n])
    if block.live:
        yield block


def _kind(tensor: Tensor, own: Sequence[Tensor | None]) -> tuple[object, ...]:
    return tuple(None if t is None else (t.device, t.dtype) for t in (tensor, *own))


def _pieces(tensor: Tensor, size: int, flat: bool) -> tuple[Tensor, ...]:
    """``tensor`` in order, in pieces of at most ``size`` elements."""
    if flat and 0 < size <= tensor.numel():
        return tensor.view(-1).split(size)
    if tensor.numel() <= size:
        return (tensor,)
    if rows := size * len(tensor) // tensor.numel():
        return tensor.split(rows)
    return tuple(piece for row in tensor for piece in _pieces(row, size, flat))


def _updating(block: _Block, rows: Sequence[RowUpdate], noise: _Noise) -> Callable[[list[Tensor]], None]:
    return lambda copies: _update(replace(block, live=copies), rows, noise)


def _update(block: _Block, rows: Sequence[RowUpdate], noise: _Noise) -> None:
    fused = [row for row in rows if block.whole and _can_fuse(block, row)]
    for row in rows:
        if row not in fused:
            _update_row(block, row, noise)
    if fused:
        gains = torch.tensor([row.live for row in fused], dtype=torch.float64, device=block.live[0].device)
        _fused.lerp_all(block.live[0], [block.buffers[row.buffer][0] for row in fused], gains)


def _can_fuse(block: _Block, row: RowUpdate) -> bool:
    target = block.buffers[row.buffer][0]
    is_lerp = not row.others and row.keep > 0.0
    return is_lerp and target.dtype != torch.bfloat16 and target.device == block.live[0].device


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
