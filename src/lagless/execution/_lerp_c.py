"""Averages on the host moved towards the live weights by one call into C, compiled at first use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lagless.execution._c import NO_FMA, REALS, functions, in_memory, threads_for
from lagless.execution._low_bits import LOW_DTYPE

LERP_C_SMALLEST = 1 << 20  # elements of all tensors together: fewer are not worth compiling for
LERP_C_MANY = 1 << 10  # tensors: so many are, whatever their size

Column = Sequence[Tensor]


def fits_lerp_c(live: Tensor, averages: Sequence[Tensor]) -> bool:
    """Whether the tensors lie on the host, without gaps and in one type, and there is a C compiler."""
    return in_memory((live, *averages)) and _library() is not None


def lerp_c(
    live: Column, averages: Sequence[Column], gains: Sequence[float], low: Sequence[Column | None] | None = None
) -> None:
    """``b_k ← b_k + gains_k (live - b_k)`` for every k in one pass, bit for bit as ``torch.lerp`` does it in float32.

    Args:
        live: weights of each parameter, as :func:`fits_lerp_c` wants them, all of one type.
        averages: k columns like ``live``, modified in place.
        gains: k numbers.
        low: for each average, in float32, None or its low bits, which then move with it as in ``lerp_low_``.

    Raises:
        ValueError: if a tensor is not as the others of its parameter are. C sees only addresses and the size of the
            first: it would read and write past a smaller one.
    """
    library, dtype = _library(), live[0].dtype
    assert library is not None
    low = [None] * len(gains) if low is None else low
    sizes = np.array([t.numel() for t in live], dtype=np.int64)
    columns = [_addresses(column, sizes, dtype) for column in (live, *averages)]
    columns += [np.zeros(len(sizes), np.uintp) if c is None else _addresses(c, sizes, LOW_DTYPE) for c in low]
    addresses, numbers = np.ascontiguousarray(np.stack(columns, axis=1)), np.array(gains, dtype=REALS[dtype])
    library[dtype](
        len(sizes),
        len(gains),
        sizes.ctypes.data,
        addresses.ctypes.data,
        numbers.ctypes.data,
        threads_for(int(sizes.sum())),
    )


def _addresses(column: Column, sizes: NDArray[np.int64], dtype: torch.dtype) -> NDArray[np.uintp]:
    """Of tensors that hold ``sizes`` elements of ``dtype``, without gaps, in memory of the host."""
    kinds = {(t.dtype, t.device.type, t.layout) for t in column}
    fits = kinds == {(dtype, "cpu", torch.strided)} and all(t.is_contiguous() for t in column)
    found = np.array([t.numel() for t in column], dtype=np.int64)
    addresses = np.array([t.data_ptr() for t in column] if fits else [], dtype=np.uintp)
    fits = fits and np.array_equal(found, sizes) and not np.any((addresses == 0) & (sizes > 0))
    if not fits or np.any(addresses % dtype.itemsize):
        raise ValueError(
            f"tensors for C are {sorted(map(str, kinds))} with {found[:5]}... elements; they must be aligned, "
            f"contiguous {dtype} tensors on the CPU with {sizes[:5]}... elements. If averages were resized, make a new "
            "Averager."
        )
    return addresses


@functools.cache
def _library() -> dict[torch.dtype, Callable[..., None]] | None:
    """By type; None where there is no working compiler."""
    return functions("lerp.c", "lerp", NO_FMA, [ctypes.c_size_t] * 2 + [ctypes.c_void_p] * 3 + [ctypes.c_size_t])
