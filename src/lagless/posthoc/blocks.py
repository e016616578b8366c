"""One worker's buffers for a range of elements, and the small matrix product on them."""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from lagless.posthoc.kernel import multiply
from lagless.posthoc.readers import Reader, byte_view
from lagless.posthoc.safetensors_format import TensorInfo

WIDEST = 8  # bytes of the widest type that is stored

_GRAIN = 256  # elements; widths are multiples of it
_PADDING = (
    16  # elements between rows: at a distance of a power of two they would compete for the same lines of the cache
)


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
        ValueError: if ``memory`` is too small for any block.
    """
    per_element = (rows + columns) * sum_bytes + 2 * WIDEST  # the second WIDEST is for what a consumer casts to
    padding = _PADDING * (rows + columns) * sum_bytes
    most = (memory - padding) // per_element
    width = min(max(wanted // per_element, shortest), most) // _GRAIN * _GRAIN
    if width <= 0:
        raise ValueError(
            f"memory: {memory} bytes per worker are too few for {rows} averages of {columns} checkpoints; "
            f"{_GRAIN * per_element + padding} are the least. Raise memory, or form fewer averages at once."
        )
    return width


class Workspace:
    """Rows for N checkpoints and sums for G averages, ``width`` elements each.

    Attributes:
        rows: shape (N, width), the elements of each checkpoint in the type of the sums.
        sums: shape (G, width).
    """

    def __init__(self, weights: NDArray[np.float64], width: int, dtype: torch.dtype, scratch: Tensor) -> None:
        count, columns = weights.shape
        self._weights, self._scratch = torch.from_numpy(weights).to(dtype), scratch
        self.rows = torch.zeros(columns, width + _PADDING, dtype=dtype, device="cpu")[:, :width]
        self.sums = torch.zeros(count, width + _PADDING, dtype=dtype, device="cpu")[:, :width]
        self._bytes = [byte_view(row) for row in self.rows]

    def load(self, row: int, reader: Reader, info: TensorInfo, start: int, count: int, digest: xxhash.xxh3_128) -> None:
        """Read ``count`` elements from ``start`` on into a row, and add their bytes to ``digest``."""
        size = info.dtype.itemsize
        if info.dtype == self.rows.dtype:
            raw = self._bytes[row][: count * size]
            reader.read(start * size, raw)
        else:
            stored = self._scratch[: count * size].view(info.dtype)
            raw = byte_view(stored)
            reader.read(start * size, raw)
            self.rows[row, :count].copy_(stored)
        digest.update(raw.data)

    def multiply(self, count: int) -> Tensor:
        """The first ``count`` elements of every average, shape (G, count)."""
        return multiply(self._weights, self.rows[:, :count], self.sums[:, :count])


def covering_rows(weights: NDArray[np.float64]) -> list[int]:
    """A few rows in which every column has a nonzero weight: NaN or infinity in any checkpoint shows in their sums."""
    left, chosen = np.ones(weights.shape[1], dtype=bool), []
    while left.any():
        chosen.append(int(np.argmax((weights[:, left] != 0.0).sum(axis=1))))
        left &= weights[chosen[-1]] == 0.0
    return chosen
