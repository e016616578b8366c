"""One worker's buffers for a range of elements, and the small matrix product on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from lagless.checkpoints import Bytes, FileReader, Reader, byte_view
from lagless.execution import Pieces, Product, from_numpy

WIDEST = 8  # bytes of the widest type that is stored

_KEPT = 8  # sizes of blocks to keep prepared: all of a tensor but the last are of one, and tensors come by size
_GRAIN = 256  # elements; widths are multiples of it
_PADDING = (
    16  # elements between rows: at a distance of a power of two they would compete for the same lines of the cache
)


def scratch_bytes(columns: int, converted: Iterable[torch.dtype]) -> int:
    """Bytes of scratch per element of a block: for N checkpoints whose type is ``converted``, or one that is copied."""
    return max(WIDEST, columns * max((dtype.itemsize for dtype in converted), default=0))


def block_width(rows: int, columns: int, sum_bytes: int, scratch: int, memory: int, wanted: int, shortest: int) -> int:
    """How many elements a block may have.

    Args:
        rows: G, averages.
        columns: N, checkpoints.
        sum_bytes: bytes per element of the types summed in, all together.
        scratch: bytes per element of the scratch.
        memory: bytes allowed.
        wanted: bytes at which blocks are fastest.
        shortest: elements below which reading is slow; a block is longer than ``wanted`` for its sake.

    Raises:
        ValueError: if ``memory`` is too small for any block.
    """
    per_element = (rows + columns) * sum_bytes + scratch + WIDEST  # WIDEST is for what a consumer casts to
    padding = _PADDING * (rows + columns) * sum_bytes
    most = (memory - padding) // per_element
    width = min(max(wanted // per_element, shortest), most) // _GRAIN * _GRAIN
    if width <= 0:
        raise ValueError(
            f"memory: {memory} bytes per worker are too few for {rows} averages of {columns} checkpoints; "
            f"{_GRAIN * per_element + padding} are the least. Raise memory, or form fewer averages at once."
        )
    return width


class OpenTensor:
    """One tensor in N checkpoints, open for reading; what is read is added to a digest for each checkpoint.

    Args:
        readers: of the tensor in each checkpoint.
        types: in which each stores it.
    """

    def __init__(self, readers: Sequence[Reader], types: Sequence[torch.dtype]) -> None:
        self.types = tuple(types)
        self._readers, self._itemsizes = readers, np.array([dtype.itemsize for dtype in types], dtype=np.int64)
        self._digests = [xxhash.xxh3_128() for _ in readers]
        files = [reader.place for reader in readers if isinstance(reader, FileReader) and reader.place is not None]
        self._files = None
        if len(files) == len(readers):
            descriptors, begins = zip(*files, strict=True)
            self._files = np.array(descriptors, dtype=np.int32), np.array(begins, dtype=np.int64)

    def read(self, start: int, pieces: Pieces) -> None:
        """Fill each of the N pieces with bytes from element ``start`` on, and add them to the digests."""
        done = 0
        if self._files is not None:
            descriptors, begins = self._files
            done = pieces.fill(descriptors, begins + start * self._itemsizes)
        for digest, view in zip(self._digests[:done], pieces.views, strict=False):
            digest.update(view)
        for row in range(done, len(self._readers)):  # says what is wrong with a file that could not be read above
            self.read_one(row, start, pieces.views[row])

    def read_one(self, row: int, start: int, piece: memoryview) -> None:
        """Fill a piece with bytes of one checkpoint from element ``start`` on, and add them to its digest."""
        self._readers[row].read(start * self.types[row].itemsize, np.frombuffer(piece, dtype=np.uint8))
        self._digests[row].update(piece)

    def hexdigests(self) -> list[str]:
        """The digests of what was read, one per checkpoint."""
        return [digest.hexdigest() for digest in self._digests]


class Workspace:
    """Rows for N checkpoints and sums for G averages, ``width`` elements each.

    Args:
        weights: shape (G, N).
        width: elements.
        dtype: of the sums.
        checked: averages to look for values that are not finite in.
        scratch: memory for what is stored in other types.

    Attributes:
        rows: shape (N, width), the elements of each checkpoint in the type of the sums.
    """

    def __init__(
        self, weights: NDArray[np.float64], width: int, dtype: torch.dtype, checked: Sequence[int], scratch: Tensor
    ) -> None:
        count, columns = weights.shape
        self._weights, self._width, self._checked = from_numpy(weights).to(dtype), width, checked
        self._scratch = scratch
        self.rows = torch.zeros(columns, width + _PADDING, dtype=dtype, device="cpu")[:, :width]
        self._sums = torch.zeros(count, width + _PADDING, dtype=dtype, device="cpu")[:, :width]
        self._prepared: dict[tuple[int, tuple[torch.dtype, ...]], _Prepared] = {}

    def form(self, tensor: OpenTensor, start: int, count: int) -> tuple[Tensor, bool]:
        """The averages of ``count`` elements from ``start`` on, shape (G, count); whether the checked are finite."""
        key = count, tensor.types
        if key not in self._prepared:
            if len(self._prepared) == _KEPT:
                self._prepared.clear()
            self._prepared[key] = self._prepare(*key)
        prepared = self._prepared[key]
        tensor.read(start, prepared.pieces)
        for rows, stored in prepared.converted:
            rows.copy_(stored)
        return prepared.sums, prepared.product()

    def _prepare(self, count: int, types: tuple[torch.dtype, ...]) -> _Prepared:
        rows, sums = self.rows[:, :count], self._sums[:, :count]
        slot = self._width * max((stored.itemsize for stored in types if stored != rows.dtype), default=0)
        slots = self._scratch[: slot * len(rows)].view(len(rows), -1)
        pieces: list[Bytes] = []
        converted: list[tuple[Tensor, Tensor]] = []
        for stored, run in groupby(range(len(rows)), types.__getitem__):
            alike = list(run)
            part = slice(alike[0], alike[-1] + 1)
            if stored == rows.dtype:
                pieces += [byte_view(row) for row in rows[part]]
            else:
                held = slots.view(stored)[part, :count]
                pieces += [byte_view(row) for row in held]
                converted.append((rows[part], held))
        return _Prepared(Pieces(pieces), converted, sums, Product(self._weights, rows, sums, self._checked))


class _Prepared(NamedTuple):
    """What blocks of one size and one set of stored types share: a block is short, so that preparing it would show."""

    pieces: Pieces
    converted: list[tuple[Tensor, Tensor]]
    sums: Tensor
    product: Product


def keep_constants(rows: Tensor, sums: Tensor, which: Sequence[int]) -> Tensor | None:
    """Put elements that all rows have in common into some of the sums, which rounding may have moved.

    Args:
        rows: shape (N, C).
        sums: shape (G, C), modified in place.
        which: the sums that are averages: those whose weights sum to 1.

    Returns:
        Where the rows have one value, or None if they differ everywhere.
    """
    values = rows.numpy()  # comparisons of numpy take a third of the time of torch's
    same = values[0] == values[-1]
    if not same.any():  # as in most blocks of float32 weights that train
        return None
    equal = np.empty_like(same)
    for row in values[1:-1]:
        same &= np.equal(row, values[0], out=equal)
    if not same.any():
        return None
    found = from_numpy(same)
    for g in which:
        torch.where(found, rows[-1], sums[g], out=sums[g])
    return found


def covering_rows(weights: NDArray[np.float64]) -> list[int]:
    """A few rows in which every column has a nonzero weight: NaN or infinity in any checkpoint shows in their sums."""
    left, chosen = np.ones(weights.shape[1], dtype=bool), list[int]()
    while left.any():
        chosen.append(int(np.argmax((weights[:, left] != 0.0).sum(axis=1))))
        left &= weights[chosen[-1]] == 0.0
    return chosen
