"""Reading ranges of one stored tensor as raw bytes."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._safetensors_format import TensorInfo

Bytes = NDArray[np.uint8]


class Reader(Protocol):
    """Reads ranges of one tensor; safe to use from one thread at a time."""

    def read(self, offset: int, out: Bytes) -> None:
        """Fill ``out`` with the tensor's bytes from ``offset`` on; both ends lie between elements."""
        ...

    def __enter__(self) -> Reader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FileReader:
    """A tensor whose bytes lie in a file from ``begin`` on, read with ``preadv`` straight into the caller's buffer.

    Args:
        path: the file.
        begin: the byte at which the tensor begins.
        keep_open: hold the file open between reads; without it each read opens the file, for trajectories of so many
            checkpoints that file descriptors would run out.
    """

    def __init__(self, path: Path, begin: int, keep_open: bool = True) -> None:
        self._path, self._begin = path, begin
        self._descriptor = self._open() if keep_open else None

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY)
        except OSError as error:
            advice = "Raise ulimit -n." if error.errno == errno.EMFILE else "Is it being deleted?"
            raise CheckpointError(f"{self._path}: cannot be opened ({error.strerror}). {advice}") from error

    @property
    def place(self) -> tuple[int, int] | None:
        """The descriptor of the open file and the byte at which the tensor begins; None if it is not held open."""
        return None if self._descriptor is None else (self._descriptor, self._begin)

    def read(self, offset: int, out: Bytes) -> None:
        """See :class:`Reader`.

        Raises:
            CheckpointError: if the file ends early or the disk fails.
        """
        descriptor = self._open() if self._descriptor is None else self._descriptor
        try:
            position = self._begin + offset
            while out.size:
                count = os.preadv(descriptor, [out.data], position)
                if count == 0:
                    raise CheckpointError(
                        f"{self._path}: ended at byte {position} while being read. Is it being rewritten?"
                    )
                out, position = out[count:], position + count
        except OSError as error:
            raise CheckpointError(f"{self._path}: reading failed ({error.strerror}).") from error
        finally:
            if self._descriptor is None:
                os.close(descriptor)

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class StridedReader:
    """A tensor whose elements do not lie row by row, held in memory from the first read until it is closed.

    Args:
        source: reads the bytes of the tensor's storage from its first element on.
        info: type and shape.
        strides: in elements, per dimension.
        extent: elements of the storage from the tensor's first to its last.
    """

    def __init__(self, source: FileReader, info: TensorInfo, strides: tuple[int, ...], extent: int) -> None:
        self._source, self._info, self._strides, self._extent = source, info, strides, extent
        self._elements: Any = None  # of NDArray[np.void], whose views pyright does not know

    def read(self, offset: int, out: Bytes) -> None:
        """See :class:`Reader`."""
        size = self._info.dtype.itemsize
        if self._elements is None:
            held = np.empty(self._extent * size, dtype=np.uint8)
            self._source.read(0, held)
            steps = tuple(stride * size for stride in self._strides)
            self._elements = as_strided(
                np.ndarray(self._extent, f"V{size}", held), self._info.shape, steps, writeable=False
            )
        first, count = offset // size, out.size // size
        out[:] = self._elements.flat[first : first + count].view(np.uint8)  # copies the range, never the tensor

    def __enter__(self) -> StridedReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._elements = None
        self._source.__exit__(kind, error, trace)


class Place(Protocol):
    """Where a tensor lies, and how to read it."""

    @property
    def path(self) -> Path:
        """The file, to name it in messages."""
        ...

    def open(self, keep_open: bool) -> Reader:
        """A reader of this tensor, which may hold files open until it is closed."""
        ...


@dataclass(frozen=True)
class FilePlace:
    """Where a tensor lies: in a file, from byte ``begin`` on."""

    path: Path
    begin: int

    def open(self, keep_open: bool) -> Reader:
        """A reader of this tensor."""
        return FileReader(self.path, self.begin, keep_open)


@dataclass(frozen=True)
class StridedPlace:
    """Where a tensor lies that is not stored row by row: its first element is at byte ``begin`` of a file."""

    path: Path
    begin: int
    info: TensorInfo
    strides: tuple[int, ...]
    extent: int

    def open(self, keep_open: bool) -> Reader:
        """A reader of this tensor."""
        return StridedReader(FileReader(self.path, self.begin, keep_open), self.info, self.strides, self.extent)


def byte_view(tensor: Tensor) -> Bytes:
    """The bytes of a contiguous tensor, sharing its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
