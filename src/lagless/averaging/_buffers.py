"""The distinct buffers of all rules over one set of tensors, and their update in one pass over the live weights.

The update is bound by memory traffic. Tensors are cut into blocks that stay in cache, and every buffer's update of a
block is done before the next block is touched: the live weights are read from memory once for all rules. Several
averages on the host are moved by one call into C, and so are those that keep the low bits of small updates; elsewhere,
compiled, those of a large tensor by one kernel. Buffers on the host follow an accelerator in a thread.

How tensors are cut depends on their kinds alone and is kept from one update to the next, as places in lists; tensors
are not kept, since views of them would hold the memory of a model that has moved to another device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lagless.averaging._offload import Offload, can_overlap
from lagless.execution import (
    KERNEL_SMALLEST,
    LERP_C_MANY,
    LERP_C_SMALLEST,
    LOW_DTYPE,
    Noise,
    RowUpdate,
    apply_row,
    buffer_dtype,
    fits_lerp_c,
    foreach_zero_,
    is_small,
    lerp_c,
    lerp_compiled,
    on_device,
    pieces,
)

# Elements. On CPUs 4 MiB of float32 stay in a shared cache and are large enough to hide the cost of a call; elsewhere
# a launch costs more than reading the live weights again.
_CPU_BLOCK, _BLOCK = 1 << 20, 1 << 26
_MOST_PLANS = 16  # combinations of rules that are due together

Low = list[Tensor | None]
"""What the rounding of one buffer's tensors has cut off; None where that is not kept, empty if for none of them."""


class _Piece(NamedTuple):
    """One of the pieces, of ``size`` elements at most, of the tensors in one place of all lists."""

    place: int
    number: int
    size: int
    flat: bool


class _Part(NamedTuple):
    """Pieces of one device and dtype per list; ``whole`` if that is one large tensor, for a compiled kernel."""

    pieces: tuple[_Piece, ...]
    cut: bool
    whole: bool


class _Plan(NamedTuple):
    """How one update is done: which tensors by C, and the cuts of the others and, for rows not for C, of those."""

    in_c: list[list[int]]  # by dtype of the live tensors
    others: list[_Part]
    same: list[_Part]


@dataclass
class _Block:
    """Pieces of live tensors and the same pieces of every buffer; one device and dtype per list.

    Attributes:
        live: pieces of the live tensors.
        buffers: for each buffer, its pieces; none for a buffer that is kept elsewhere.
        low: for each buffer, the pieces of its low bits; none where they are not kept.
        whole: whether this is one large tensor, for a compiled kernel.
    """

    live: list[Tensor] = field(default_factory=list[Tensor])
    buffers: list[list[Tensor]] = field(default_factory=list[list[Tensor]])
    low: list[list[Tensor]] = field(default_factory=list[list[Tensor]])
    whole: bool = False


class AverageBuffers:
    """Buffers, each a list of tensors like the live ones and starting as their copy.

    Buffers that hold iterates (θ_0, snapshots) keep the parameters' dtype, which loses nothing; averages have
    ``dtype``. Those in float32 whose gain falls below 0.01 get low bits beside them, half as much memory again.

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
        self._kinds: list[Hashable] = []
        self._plans: dict[Hashable, _Plan] = {}
        for label in labels:
            self._buffers.append([])
            for tensor in () if label in absent else live:
                kind = buffer_dtype(label, tensor.dtype, dtype)
                self._buffers[-1].append(torch.empty_like(tensor, dtype=kind, device=device).copy_(tensor))
        self._low: list[Low] = [[] for _ in labels]

    @property
    def buffers(self) -> list[list[Tensor]]:
        """One list of tensors per label, after the updates given so far."""
        self.wait()
        return self._buffers

    @property
    def low(self) -> list[Low]:
        """The low bits of each buffer, after the updates given so far."""
        self.wait()
        return self._low

    def keep_low(self, buffer: int) -> None:
        """Make room for the low bits of the float32 tensors of ``buffer``, which are 0 at first."""
        self.wait()
        if not self._low[buffer] and any(t.dtype == torch.float32 for t in self._buffers[buffer]):
            self._plans = {}
            self._low[buffer] = [
                torch.zeros_like(t, dtype=LOW_DTYPE) if t.dtype == torch.float32 else None
                for t in self._buffers[buffer]
            ]

    def update(self, live: Sequence[Tensor], rows: Sequence[RowUpdate], step: int) -> None:
        """Apply ``rows`` in the given order: one that reads another buffer's old value comes before that one's own.

        If the buffers are on the host and live tensors on an accelerator, this is only begun here.
        """
        kinds: list[Hashable] = [(type(t), t.dtype, t.device, t.shape, t.is_contiguous(), t.is_neg()) for t in live]
        if kinds != self._kinds:
            self._kinds, self._plans = kinds, {}
            if self._device is None:
                self._follow_devices(live)
        for row in rows:
            if is_small(row):
                self.keep_low(row.buffer)
        noise = Noise(self.seed, step)
        if self._device is not None and self._device.type == "cpu" and any(can_overlap(t.device) for t in live):
            self._offload = self._offload or Offload()
            parts = self._cut(live, range(len(live)), staged=True)
            largest = _CPU_BLOCK * max(t.element_size() for t in live)
            live = [t.detach() for t in live]  # the thread records for autograd, as every new one does
            blocks = _blocks(parts, live, self._buffers, self._low)
            self._offload.start(live, ((block.live, _updating(block, rows, noise)) for block in blocks), largest)
            return
        key = tuple((row.buffer, _is_lerp(row), is_small(row)) for row in rows)
        if key not in self._plans:
            if len(self._plans) >= _MOST_PLANS:
                self._plans = {}
            self._plans[key] = self._plan(live, rows)
        plan = self._plans[key]
        for block in _blocks(plan.others, live, self._buffers, self._low):
            _update(block, rows, noise)
        lerps = [row for row in rows if _is_lerp(row)]
        if len(lerps) < len(rows):
            rest = [row for row in rows if not _is_lerp(row)]
            for block in _blocks(plan.same, live, self._buffers, self._low):
                _update(block, rest, noise)
        for places in plan.in_c:
            self._update_in_c(live, places, lerps)

    def _plan(self, live: Sequence[Tensor], rows: Sequence[RowUpdate]) -> _Plan:
        in_c = self._for_c(live, [row for row in rows if _is_lerp(row)])
        chosen = sorted(i for places in in_c for i in places)
        # A single average reads the live weights once in any case: cutting would only cost calls, except that it keeps
        # converted copies and other temporaries small.
        converts = any(t.dtype != b[i].dtype for b in self._buffers if b for i, t in enumerate(live))
        share = converts or len(rows) > 1 or any(map(is_small, rows))
        others = sorted(set(range(len(live))) - set(chosen))
        return _Plan(in_c, self._cut(live, others, share=share), self._cut(live, chosen, share=share))

    def _for_c(self, live: Sequence[Tensor], lerps: Sequence[RowUpdate]) -> list[list[int]]:
        """The tensors whose averages one call into C can move, by dtype.

        A single average gains by it only if it keeps low bits, or if tensors are so many that calls cost the most; and
        in float32 alone, where it is torch's lerp bit for bit.
        """
        if not lerps or (sum(t.numel() for t in live) < LERP_C_SMALLEST and len(live) < LERP_C_MANY):
            return []
        several = len(lerps) > 1
        if not (several or is_small(lerps[0]) or len(live) >= LERP_C_MANY):
            return []
        found: dict[torch.dtype, list[int]] = {}
        for i, tensor in enumerate(live):
            if (several or tensor.dtype == torch.float32) and fits_lerp_c(
                tensor, [self._buffers[row.buffer][i] for row in lerps]
            ):
                found.setdefault(tensor.dtype, []).append(i)
        return list(found.values())

    def _update_in_c(self, live: Sequence[Tensor], places: Sequence[int], lerps: Sequence[RowUpdate]) -> None:
        low: list[list[Tensor] | None] = []
        for row in lerps:
            own = [bits for i in places if self._low[row.buffer] and (bits := self._low[row.buffer][i]) is not None]
            if own and not is_small(row):
                foreach_zero_(own)
            low.append(own if own and is_small(row) else None)
        columns = [[self._buffers[row.buffer][i] for i in places] for row in lerps]
        lerp_c([live[i] for i in places], columns, [row.live for row in lerps], low)

    def _cut(
        self, live: Sequence[Tensor], places: Collection[int], *, share: bool = False, staged: bool = False
    ) -> list[_Part]:
        lists = [*self._buffers, *self._low]
        columns = [(i, live[i], [b[i] if b else None for b in lists]) for i in places]
        return list(_cut(columns, share=share, staged=staged, compile=self._compile))

    def wait(self) -> None:
        """Block until every update that was begun has ended.

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
        for bits in self._low:
            for i, tensor in enumerate(bits):
                if tensor is not None and tensor.device != live[i].device:
                    bits[i] = tensor.to(live[i].device)


def _cut(
    columns: Sequence[tuple[int, Tensor, Sequence[Tensor | None]]],
    *,
    share: bool = False,
    staged: bool = False,
    compile: bool = False,
) -> Iterator[_Part]:
    """Parts that cover all tensors, in an order that depends on their kinds and sizes alone.

    Args:
        columns: the place of each live tensor, itself, and its buffers and their low bits; None is kept elsewhere.
        share: whether parts on CPUs should be small enough to stay in cache.
        staged: whether all parts must be, because they pass through memory of the host.
        compile: give every large tensor, or piece of one that is staged, a part of its own.
    """
    part: list[_Piece] = []
    cut, whole, kind, room = False, False, None, 0
    for place, tensor, own in sorted(columns, key=lambda column: str(_kind(*column[1:]))):
        flat = all(t is None or t.is_contiguous() for t in (tensor, *own))
        large = compile and flat and tensor.numel() >= KERNEL_SMALLEST
        size = _CPU_BLOCK if staged or (share and tensor.device.type == "cpu") else _BLOCK
        size = tensor.numel() if large and not staged else size
        for number, piece in enumerate(pieces(tensor, size, flat)):
            if large or whole or room < piece.numel() or kind != _kind(tensor, own):
                if part:
                    yield _Part(tuple(part), cut, whole)
                part, cut, kind, room = [], False, _kind(tensor, own), 0 if large else size
                whole = large
            room -= piece.numel()
            part.append(_Piece(place, number, size, flat))
            cut |= piece is not tensor
    if part:
        yield _Part(tuple(part), cut, whole)


def _blocks(
    parts: Sequence[_Part], live: Sequence[Tensor], buffers: Sequence[Sequence[Tensor]], low: Sequence[Low]
) -> Iterator[_Block]:
    """The tensors of each part."""
    last: dict[int, tuple[_Piece, tuple[Tensor, ...]]] = {}

    def piece_of(list_number: int, tensor: Tensor, piece: _Piece) -> Tensor:
        """Pieces of one tensor follow each other, so those of the latest are all that is kept."""
        known, found = last.get(list_number, (None, ()))
        if known is None or known.place != piece.place:
            found = pieces(tensor, piece.size, piece.flat)
            last[list_number] = piece, found
        return found[piece.number]

    for part in parts:
        places = [piece.place for piece in part.pieces]
        lists: list[list[Tensor]] = []
        for n, tensors in enumerate((live, *buffers, *low)):
            own = [tensors[i] for i in places] if tensors else []
            if not own or own[0] is None:  # all are of one kind
                lists.append([])
            elif part.cut:
                lists.append([piece_of(n, cast(Tensor, t), piece) for t, piece in zip(own, part.pieces, strict=True)])
            else:
                lists.append(cast("list[Tensor]", own))
        yield _Block(lists[0], lists[1 : 1 + len(buffers)], lists[1 + len(buffers) :], part.whole)


def _kind(tensor: Tensor, own: Sequence[Tensor | None]) -> tuple[object, ...]:
    return tuple(None if t is None else (t.device, t.dtype) for t in (tensor, *own))


def _updating(block: _Block, rows: Sequence[RowUpdate], noise: Noise) -> Callable[[list[Tensor]], None]:
    return lambda copies: _update(replace(block, live=copies), rows, noise)


def _update(block: _Block, rows: Sequence[RowUpdate], noise: Noise) -> None:
    fused = [row for row in rows if block.whole and _can_fuse(block, row)]
    for row in rows:
        if row not in fused:
            apply_row(block.buffers, row, block.live, noise, block.low[row.buffer])
    if fused:
        gains = on_device(tuple(row.live for row in fused), torch.float64, block.live[0].device)
        low: list[Tensor | None] = []
        for row in fused:
            bits = block.low[row.buffer]
            if bits and not is_small(row):
                bits[0].zero_()
            low.append(bits[0] if bits and is_small(row) else None)
        lerp_compiled(block.live[0].detach(), [block.buffers[row.buffer][0] for row in fused], gains, low)


def _can_fuse(block: _Block, row: RowUpdate) -> bool:
    target = block.buffers[row.buffer][0]
    return _is_lerp(row) and target.dtype != torch.bfloat16 and target.device == block.live[0].device


def _is_lerp(row: RowUpdate) -> bool:
    return not row.others and row.keep > 0.0
