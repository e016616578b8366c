"""The distinct buffers of all rules over one set of tensors, and their update in one pass over the live weights.

The update is bound by memory traffic. Tensors are cut into blocks that stay in cache, and every buffer's update of a
block is done before the next block is touched: the live weights are read from memory once for all rules. Several
averages on the host are moved by one call into C; elsewhere, compiled, those of a large tensor by one kernel. Buffers
on the host follow an accelerator in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lagless.averaging._offload import Offload, can_overlap
from lagless.execution import (
    KERNEL_SMALLEST,
    LERP_C_SMALLEST,
    Noise,
    RowUpdate,
    apply_row,
    buffer_dtype,
    fits_lerp_c,
    lerp_c,
    lerp_compiled,
    pieces,
)

# Elements. On CPUs 4 MiB of float32 stay in a shared cache and are large enough to hide the cost of a call; elsewhere
# a launch costs more than reading the live weights again.
_CPU_BLOCK, _BLOCK = 1 << 20, 1 << 26


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


class AverageBuffers:
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
            self._buffers.append([])
            for tensor in () if label in absent else live:
                kind = buffer_dtype(label, tensor.dtype, dtype)
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
        noise = Noise(self.seed, step)
        if self._device is not None and self._device.type == "cpu" and any(can_overlap(t.device) for t in live):
            self._offload = self._offload or Offload()
            blocks = _cut(live, self._buffers, staged=True, compile=self._compile)
            largest = _CPU_BLOCK * max(t.element_size() for t in live)
            self._offload.start(live, ((block.live, _updating(block, rows, noise)) for block in blocks), largest)
            return
        lerps = [row for row in rows if _is_lerp(row)]
        together = self._together(live, lerps)
        self._update_in_blocks(live, set(range(len(live))) - together, rows, noise)
        self._update_in_blocks(live, together, [row for row in rows if row not in lerps], noise)
        for dtype in {live[i].dtype for i in together}:
            columns = [[live[i], *(self.buffers[row.buffer][i] for row in lerps)] for i in sorted(together)]
            lerp_c([c for c in columns if c[0].dtype == dtype], [row.live for row in lerps])

    def _together(self, live: Sequence[Tensor], lerps: Sequence[RowUpdate]) -> set[int]:
        """The tensors whose averages one call into C can move. A single average gains nothing by it."""
        if len(lerps) < 2 or sum(t.numel() for t in live) < LERP_C_SMALLEST:
            return set()
        return {i for i, t in enumerate(live) if fits_lerp_c(t, [self.buffers[r.buffer][i] for r in lerps])}

    def _update_in_blocks(
        self, live: Sequence[Tensor], which: Collection[int], rows: Sequence[RowUpdate], noise: Noise
    ) -> None:
        if not which or not rows:
            return
        chosen = sorted(which)
        live, buffers = [live[i] for i in chosen], [[b[i] for i in chosen] if b else [] for b in self.buffers]
        # A single average reads the live weights once in any case: cutting would only cost calls, except that it keeps
        # converted copies small.
        converts = any(t.dtype != b[i].dtype for b in buffers if b for i, t in enumerate(live))
        for block in _cut(live, buffers, share=converts or len(rows) > 1, compile=self._compile):
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
        whole = compile and flat and tensor.numel() >= KERNEL_SMALLEST
        size = _CPU_BLOCK if staged or (share and tensor.device.type == "cpu") else _BLOCK
        size = tensor.numel() if whole and not staged else size
        parts = [None if t is None else pieces(t, size, flat) for t in own]
        for n, piece in enumerate(pieces(tensor, size, flat)):
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


def _updating(block: _Block, rows: Sequence[RowUpdate], noise: Noise) -> Callable[[list[Tensor]], None]:
    return lambda copies: _update(replace(block, live=copies), rows, noise)


def _update(block: _Block, rows: Sequence[RowUpdate], noise: Noise) -> None:
    fused = [row for row in rows if block.whole and _can_fuse(block, row)]
    for row in rows:
        if row not in fused:
            apply_row(block.buffers, row, block.live, noise)
    if fused:
        gains = torch.tensor([row.live for row in fused], dtype=torch.float64, device=block.live[0].device)
        lerp_compiled(block.live[0], [block.buffers[row.buffer][0] for row in fused], gains)


def _can_fuse(block: _Block, row: RowUpdate) -> bool:
    target = block.buffers[row.buffer][0]
    return _is_lerp(row) and target.dtype != torch.bfloat16 and target.device == block.live[0].device


def _is_lerp(row: RowUpdate) -> bool:
    return not row.others and row.keep > 0.0
