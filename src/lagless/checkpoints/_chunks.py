"""Tensors that are stored in chunks: boxes, each saved by ``torch.save`` somewhere in one of several files."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._readers import Bytes, FileReader
from lagless.checkpoints._safetensors_format import TensorInfo
from lagless.checkpoints._torch_archive import ArchivedTensor, TorchArchive

CONVERT = "Convert the checkpoint with torch.distributed.checkpoint.format_utils.dcp_to_torch_save."


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, saved by ``torch.save`` somewhere in a file.

    Attributes:
        path: the file.
        begin: the byte at which it begins there.
        length: in bytes.
        offsets: where the box lies in the tensor, per dimension.
        sizes: of the box.
    """

    path: Path
    begin: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def data_begin(self, dtype: torch.dtype) -> int:
        """The byte of the file at which the elements begin.

        Raises:
            CheckpointError: if something else is stored there.
        """
        try:
            with self.path.open("rb") as file, io.BufferedReader(_Window(file, self.begin, self.length)) as window:
                archive = TorchArchive(window)
                tensor = archive.content
                if not isinstance(tensor, ArchivedTensor):
                    raise ValueError(f"a {type(tensor).__name__}")
                begin = self.begin + archive.begin(tensor)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.path}: this file of the checkpoint is missing. Copy the checkpoint again, or leave it out."
            ) from error
        except Exception as error:  # zipfile and pickle raise many kinds for damaged files
            raise CheckpointError(
                f"{self.path}: at byte {self.begin} there is no tensor that torch.save wrote ({error}). The checkpoint "
                "is damaged, or mixed from several saves: leave it out."
            ) from error
        if not ((tensor.dtype, tensor.shape) == (dtype, self.sizes) and tensor.is_row_major):
            raise CheckpointError(
                f"{self.path}: the chunk at byte {self.begin} is {tensor.dtype} {list(tensor.shape)}, strides "
                f"{tensor.strides}; expected {dtype} {list(self.sizes)}, row by row. {CONVERT}"
            )
        return begin

    def runs(self, shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Elements of the chunk among ``start`` to ``stop`` of the flattened tensor, run by run.

        Yields:
            Where a run begins in the flattened tensor, where in the chunk, and its length.
        """
        whole, sizes, offsets = tuple(shape) or (1,), self.sizes or (1,), self.offsets or (0,)
        # A run goes along the last dimension that is cut; those after it are whole.
        cut = max((d for d in range(len(whole)) if sizes[d] != whole[d]), default=0)
        count, length = math.prod(sizes[:cut]), math.prod(sizes[cut:])

        def begin_of(run: int) -> int:
            index = np.unravel_index(run * length, sizes)
            return int(np.ravel_multi_index([int(i) + o for i, o in zip(index, offsets, strict=True)], whole))

        for run in range(max(bisect_right(range(count), start, key=begin_of) - 1, 0), count):
            begin = begin_of(run)
            if begin >= stop:
                return
            low, high = max(begin, start), min(begin + length, stop)
            if low < high:
                yield low, run * length + low - begin, high - low


@dataclass(frozen=True)
class PlainChunk(Chunk):
    """A box of a tensor whose elements lie in a file row by row from ``begin`` on."""

    def data_begin(self, dtype: torch.dtype) -> int:
        """The byte of the file at which the elements begin."""
        return self.begin


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, per dimension."""


def covers(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether boxes hold every element of a tensor of ``shape`` exactly once.

    >>> covers((4, 2), [((0, 0), (3, 2)), ((3, 0), (1, 2))]), covers((4, 2), [((0, 0), (3, 2)), ((2, 0), (1, 2))])
    (True, False)
    """
    filled = [box for box in boxes if 0 not in box[1]]
    inside = all(
        len(offsets) == len(sizes) == len(shape)
        and all(o >= 0 and 0 <= s <= size - o for o, s, size in zip(offsets, sizes, shape, strict=True))
        for offsets, sizes in boxes
    )
    if not inside or sum(math.prod(sizes) for _, sizes in filled) != math.prod(shape):
        return False
    open_boxes: list[Box] = []  # those whose rows reach the present box: one, where only rows are cut
    for offsets, sizes in sorted(filled):
        open_boxes = [(o, s) for o, s in open_boxes if not o or o[0] + s[0] > offsets[0]]
        if any(_overlap(offsets, sizes, *other) for other in open_boxes):
            return False
        open_boxes.append((offsets, sizes))
    return True


def _overlap(offsets: Sequence[int], sizes: Sequence[int], others: Sequence[int], other_sizes: Sequence[int]) -> bool:
    sides = zip(offsets, sizes, others, other_sizes, strict=True)
    return all(begin < other + size_of_other and other < begin + size for begin, size, other, size_of_other in sides)


class ChunkReader:
    """Reads ranges of a tensor from its chunks; see :class:`lagless.checkpoints._readers.Reader`."""

    def __init__(self, info: TensorInfo, chunks: Sequence[Chunk]) -> None:
        self._info, self._chunks = info, chunks
        self._begins: dict[Chunk, int] = {}

    def read(self, offset: int, out: Bytes) -> None:
        """Fill ``out`` with the tensor's bytes from ``offset`` on."""
        size = self._info.dtype.itemsize
        start, stop = offset // size, (offset + out.size) // size
        for chunk in self._chunks:
            if runs := list(chunk.runs(self._info.shape, start, stop)):
                with FileReader(chunk.path, self._begin(chunk)) as reader:
                    for where, within, count in runs:
                        reader.read(within * size, out[(where - start) * size :][: count * size])

    def _begin(self, chunk: Chunk) -> int:
        if chunk not in self._begins:
            self._begins[chunk] = chunk.data_begin(self._info.dtype)
        return self._begins[chunk]

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@dataclass(frozen=True)
class ChunkedPlace:
    """Where a tensor lies: in chunks. ``path`` is the file of the first."""

    path: Path
    info: TensorInfo
    chunks: tuple[Chunk, ...]

    def open(self, keep_open: bool) -> ChunkReader:
        """A reader of this tensor. It holds one file open at a time, and only while it reads."""
        return ChunkReader(self.info, self.chunks)


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: Any, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._position = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._begin + self._position)
        count = self._file.readinto(memoryview(buffer)[: max(self._length - self._position, 0)])
        self._position += count
        return count
