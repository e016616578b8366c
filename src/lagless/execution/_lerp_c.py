"""Several averages of the host moved towards the live weights by one call into C, compiled at first use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lagless.execution._c import REALS, TensorTable, functions, in_memory

LERP_C_SMALLEST = 1 << 20  # elements of all tensors together: fewer are not worth compiling for

_FLAGS = ("-fno-math-errno", "-pthread", "-lm")


def fits_lerp_c(live: Tensor, averages: Sequence[Tensor]) -> bool:
    """Whether the tensors lie on the host, without gaps and in one type, and there is a C compiler."""
    return in_memory((live, *averages)) and _library() is not None


def lerp_c(rows: Sequence[Sequence[Tensor]], gains: Sequence[float]) -> None:
    """``b_k ← b_k + gains_k (live - b_k)`` for every k in one pass, bit for bit as ``torch.lerp`` does it in float32.

    Args:
        rows: live weights and k averages of each parameter, as :func:`fits_lerp_c` wants them, all of one type;
            averages are modified in place.
        gains: k numbers.
    """
    library, dtype = _library(), rows[0][0].dtype
    assert library is not None
    given, numbers = TensorTable(rows, 1 + len(gains)), np.array(gains, dtype=REALS[dtype])
    library[dtype](len(rows), len(gains), given.sizes, given.addresses, numbers.ctypes.data, given.threads)


@functools.cache
def _library() -> dict[torch.dtype, Callable[..., None]] | None:
    """By type; None where there is no working compiler."""
    return functions("lerp.c", "lerp", _FLAGS, [ctypes.c_size_t] * 2 + [ctypes.c_void_p] * 3 + [ctypes.c_size_t])
