"""The inner loops of the streamed product in C, compiled at first use by the machine's own compiler.

A matrix this small keeps a BLAS busy with packing: ours is up to 2.4 times as fast (``benchmarks/product.py``).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lagless.execution._c import REALS, compile_source, is_plain

Bytes = NDArray[np.uint8]

# Vectors are written out. What a compiler adds for a processor, like vectorised sums or products apart from their sums,
# would round the last columns differently from the others.
_FLAGS = ("-mtune=generic", "-fno-tree-vectorize")
_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p


class Product:
    """``out ← weights · x`` for given memory: prepared once, called for every block that passes through it.

    Without a C compiler, which the environment variable ``CC`` may name, it is ``torch.mm``.

    Args:
        weights: shape (G, N), without gaps; float32 or float64 like the others.
        x: shape (N, C), rows without gaps.
        out: shape (G, C), rows without gaps.
        checked: rows of ``out`` to look for values that are not finite in.

    Raises:
        ValueError: if shapes, types or memory are not as said.
    """

    def __init__(self, weights: Tensor, x: Tensor, out: Tensor, checked: Sequence[int] = ()) -> None:
        _require_fitting(weights, x, out, checked)
        self._tensors, self._checked = (weights, x, out), np.array(checked, dtype=np.int64)
        self._function = None
        if (library := _library()) is not None:
            self._function = library.product_float32 if x.dtype == torch.float32 else library.product_float64
        self._arguments = (
            *(*weights.shape, x.shape[1], weights.data_ptr(), x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0)),
            *(self._checked.size, self._checked.ctypes.data),
        )

    def __call__(self) -> bool:
        """Form the product; whether the checked rows are finite."""
        if self._function is not None:
            return bool(self._function(*self._arguments))
        weights, x, out = self._tensors
        torch.mm(weights, x, out=out)
        return all(bool(torch.isfinite(out[row]).all()) for row in self._checked)


def _require_fitting(weights: Tensor, x: Tensor, out: Tensor, checked: Sequence[int]) -> None:
    """Refuse what C would read or write in the wrong places: it sees only addresses, sizes and strides."""
    tensors = (weights, x, out)
    plain = all(t.dim() == 2 and t.is_cpu and t.dtype == x.dtype and is_plain(t) for t in tensors)
    fits = plain and x.dtype in REALS and x.shape[0] == weights.shape[1]
    fits = fits and tuple(out.shape) == (weights.shape[0], x.shape[1]) and weights.is_contiguous()
    # The stride between rows may be larger than a row, as in a slice of columns; a single row has no meaningful one.
    fits = fits and all(
        t.shape[1] <= 1 or (t.stride(1) == 1 and (t.shape[0] <= 1 or t.stride(0) >= t.shape[1])) for t in (x, out)
    )
    if not fits or not all(0 <= row < out.shape[0] for row in checked):
        found = ", ".join(f"{t.dtype} {tuple(t.shape)} with strides {t.stride()} on {t.device}" for t in tensors)
        raise ValueError(
            f"weights, x and out are {found}, checked rows {list(checked)}; they must be dense float32 or float64 "
            "matrices (G, N), (N, C), (G, C) of one type on the CPU with rows without gaps, and checked rows in [0, G)."
        )


class Pieces:
    """Pieces of memory that are filled from files by one call, again and again.

    Args:
        pieces: the memory, contiguous and writable.

    Attributes:
        views: of the pieces.
    """

    def __init__(self, pieces: Sequence[Bytes]) -> None:
        for number, piece in enumerate(pieces):
            if piece.dtype != np.uint8 or not piece.flags.c_contiguous or not piece.flags.writeable:
                raise ValueError(
                    f"piece {number} is {piece.dtype} {piece.shape} with strides {piece.strides}; give contiguous, "
                    "writable bytes."
                )
        self.views = [piece.data for piece in pieces]
        self._sizes = np.array([piece.size for piece in pieces], dtype=np.int64)
        self._addresses = np.array([piece.ctypes.data for piece in pieces], dtype=np.uintp)
        self._pointers = self._sizes.ctypes.data, self._addresses.ctypes.data

    def fill(self, files: NDArray[np.int32], positions: NDArray[np.int64]) -> int:
        """Fill each piece from an open file at a position in bytes.

        Returns:
            How many are full, counted from the first: fewer than all if a file ended or could not be read, and none
            without a C compiler.
        """
        for name, given, dtype in (("files", files, np.int32), ("positions", positions, np.int64)):
            if given.dtype != dtype or given.shape != (len(self.views),) or not given.flags.c_contiguous:
                raise ValueError(
                    f"{name} is {given.dtype} {given.shape}; it must be contiguous {np.dtype(dtype)} of shape "
                    f"({len(self.views)},), one for each piece."
                )
        library = _library()
        if library is None:
            return 0
        return library.read_pieces(len(self.views), files.ctypes.data, positions.ctypes.data, *self._pointers)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled loops; None where there is no working compiler."""
    library = compile_source("product.c", _FLAGS)
    if library is not None:
        for function in (library.product_float32, library.product_float64):
            function.argtypes = [_SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER]
            function.restype = ctypes.c_int
        library.read_pieces.argtypes = [_SIZE, _POINTER, _POINTER, _POINTER, _POINTER]
        library.read_pieces.restype = _SIZE
    return library
