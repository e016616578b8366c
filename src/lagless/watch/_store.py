"""The folder of the state: one flat file per buffer, written anew for every absorbed checkpoint, never in place.

A record names the files that count. Files that no record names are room for new ones: their space is used again, so
that a disk which held two generations has room for the next.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lagless.checkpoints import TensorInfo, byte_view

_ALIGNED = 64  # bytes
_SUFFIX = ".buffer"


class Place(NamedTuple):
    """Where a tensor lies in a buffer's file."""

    dtype: torch.dtype
    offset: int


class BufferLayout:
    """Where tensors lie in a buffer's file.

    Args:
        tensors: the shape of each tensor.
        dtypes: the type in which the buffer holds each; tensors without one are not in it.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], dtypes: Mapping[str, torch.dtype]) -> None:
        self.places: dict[str, Place] = {}
        self.nbytes = 0
        for name, dtype in dtypes.items():
            self.places[name] = Place(dtype, self.nbytes)
            size = tensors[name].numel * dtype.itemsize
            self.nbytes += -(-size // _ALIGNED) * _ALIGNED


class BufferFile:
    """An open file of one buffer.

    Args:
        path: the file.
        layout: where tensors lie in it.
        writable: whether it is written.
    """

    def __init__(self, path: Path, layout: BufferLayout, writable: bool = False) -> None:
        self.path, self._layout = path, layout
        self._descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Return elements of a tensor from ``start`` on.

        Raises:
            OSError: if the file cannot be read, or ends early.
        """
        dtype, offset = self._layout.places[name]
        block = torch.empty(count, dtype=dtype, device="cpu")
        view, position = byte_view(block), offset + start * dtype.itemsize
        while view.size:
            done = os.preadv(self._descriptor, [view.data], position)
            if done == 0:
                raise OSError(f"{self.path} ends at byte {position}; it should have {self._layout.nbytes}.")
            view, position = view[done:], position + done
        return block

    def write(self, name: str, start: int, block: Tensor) -> None:
        """Write elements of a tensor from ``start`` on.

        Raises:
            OSError: if the disk is full or fails.
        """
        dtype, offset = self._layout.places[name]
        view, position = byte_view(block.to(dtype).contiguous()), offset + start * dtype.itemsize
        while view.size:
            done = os.pwrite(self._descriptor, np.ascontiguousarray(view).data, position)
            view, position = view[done:], position + done

    def sync(self) -> None:
        """Block until the file is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; it may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def size_of(files: Iterable[Path]) -> int:
    """Bytes of files, those left out that are just going."""
    total = 0
    for file in files:
        with suppress(OSError):
            total += file.stat().st_size
    return total


class Store:
    """The files in the folder of the state.

    Args:
        folder: is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def make(self, name: str, layout: BufferLayout, kept: Collection[str]) -> BufferFile:
        """Return a new file of the layout's size, made of one that is not ``kept`` where there is one.

        Raises:
            OSError: if the disk is full.
        """
        path = self.folder / f"{name}{_SUFFIX}"
        spare = next((p for p in self._files() if p.name not in kept and p.stat().st_size == layout.nbytes), None)
        if spare is not None:
            os.rename(spare, path)
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                if layout.nbytes and hasattr(os, "posix_fallocate"):  # a full disk shows here, not half way
                    os.posix_fallocate(descriptor, 0, layout.nbytes)
                else:
                    os.ftruncate(descriptor, layout.nbytes)
            except OSError:
                path.unlink()
                raise
            finally:
                os.close(descriptor)
        return BufferFile(path, layout, writable=True)

    def open(self, name: str, layout: BufferLayout) -> BufferFile:
        """Open a file that a record names."""
        return BufferFile(self.folder / name, layout)

    def discard(self, kept: Collection[str]) -> None:
        """Remove files that no record names."""
        for path in self._files():
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def nbytes(self) -> int:
        """Bytes on the disk."""
        return size_of(self._files())

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{_SUFFIX}"))
