"""One worker's buffers for a range of elements, and the small matrix product on them."""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from lagless.posthoc.readers import Reader, byte_view
from lagless.posthoc.safetensors_format import TensorInfo

WIDEST = 8  # bytes of the widest type that is stored

_TILE = 1024
_SINGLE_THREADED_PRODUCT = 1 << 18  # below this many multiplications OpenBLAS starts no threads of its own ...
_SINGLE_THREADED_VECTOR = 1 << 13  # ... and below this many for a single row


def block_width(rows: int, columns: int, sum_bytes: int, memory: int, wanted: int, shortest: int) -> int:
    """How many elements a block may have.

    Args:
        rows: G, averages.
        columns: N, checkpoints.
        sum_bytes: bytes per element of the types summed in, all together.
        memory: bytes allowed.
        wanted: bytes at which blocks are fastest.
        shortest: elements below which reading is slow; a block is longer than ``wanted`` for its sake.

    Raises:
        ValueError: if not even a tile fits in ``memory``.
    """
    per_element = (rows + columns) * sum_bytes + 2 * WIDEST  # the second WIDEST is for what a consumer casts to
    tile = tile_width(rows, columns)
    width = min(max(wanted // per_element, shortest), memory // per_element) // tile * tile
    if width == 0:
        raise ValueError(
            f"memory: {memory} bytes per worker are too few for {rows} averages of {columns} checkpoints; "
            f"{tile * per_element} are the least. Raise memory, or form fewer averages at once."
        )
    return width


def tile_width(rows: int, columns: int) -> int:
    """Columns per matrix product, few enough that the BLAS library leaves the threading to us."""
    limit = _SINGLE_THREADED_VECTOR // columns if rows == 1 else _SINGLE_THREADED_PRODUCT // (rows * columns)
    return min(max(limit // 16 * 16, 64), _TILE)


class Workspace:
    """Rows for N checkpoints and sums for G averages, ``width`` elements each.

    Attributes:
        rows: shape (N, width), the elements of each checkpoint in the type of the sums.
        sums: shape (G, width).
    """

    def __init__(self, weights: NDArray[np.float64], width: int, dtype: torch.dtype, scratch: Tensor) -> None:
        (count, columns), tile = weights.shape, tile_width(*weights.shape)
        self._dtype, self._tile, self._scratch = dtype, tile, scratch
        self._tensors = torch.zeros(columns, width, dtype=dtype)
        self.rows = self._tensors.numpy()
        self.sums = np.zeros((count, width), dtype=self.rows.dtype)
        self._weights = weights.astype(self.rows.dtype)
        self._bytes = [byte_view(row) for row in self._tensors]
        # (tiles, N, tile) and (tiles, G, tile): one call multiplies all tiles, each as a matrix product of its own.
        self._row_tiles = self.rows.reshape(columns, -1, tile).swapaxes(0, 1)
        self._sum_tiles = self.sums.reshape(count, -1, tile).swapaxes(0, 1)

    def load(self, row: int, reader: Reader, info: TensorInfo, start: int, count: int, digest: xxhash.xxh3_128) -> None:
        """Read ``count`` elements from ``start`` on into a row, and add their bytes to ``digest``."""
        size = info.dtype.itemsize
        if info.dtype == self._dtype:
            raw = self._bytes[row][: count * size]
            reader.read(start * size, raw)
        else:
            stored = self._scratch[: count * size].view(info.dtype)
            raw = byte_view(stored)
            reader.read(start * size, raw)
            self._tensors[row, :count].copy_(stored)
        digest.update(raw.data)

    def multiply(self, count: int) -> NDArray:
        """The first ``count`` elements of every average, shape (G, count)."""
        if count <= self._tile:
            np.matmul(self._weights, self.rows[:, :count], out=self.sums[:, :count])
        else:
            tiles = -(-count // self._tile)
            np.matmul(self._weights, self._row_tiles[:tiles], out=self._sum_tiles[:tiles])
        return self.sums[:, :count]


def covering_rows(weights: NDArray[np.float64]) -> list[int]:
    """A few rows in which every column has a nonzero weight: NaN or infinity in any checkpoint shows in their sums."""
    left, chosen = np.ones(weights.shape[1], dtype=bool), []
    while left.any():
        chosen.append(int(np.argmax((weights[:, left] != 0.0).sum(axis=1))))
        left &= weights[chosen[-1]] == 0.0
    return chosen
