"""One step of PACE over all tensors of the host by one call into C, compiled at first use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.autograd.graph import increment_version

from lagless._native import compile_source
from lagless.optim._blocks import Row
from lagless.updates import PaceConstants

_SOURCE = Path(__file__).with_name("pace.c")
# Contracted products would make an element's value depend on where the compiler leaves off using vectors.
_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-lm")
_TYPES = {torch.float32: np.float32, torch.float64: np.float64}
_FEWEST = 1 << 16  # elements per thread; starting one takes as long as some ten thousand elements


def fits_call(row: Row) -> bool:
    """Whether the tensors lie on the host, without gaps and in one type, and there is a C compiler."""
    kinds = {(t.dtype, t.device.type) for t in row}
    alike = len(kinds) == 1 and row[0].device.type == "cpu" and row[0].dtype in _TYPES
    return alike and all(t.is_contiguous() for t in row) and _library() is not None


def step_in_one_call(rows: Sequence[Row], k: PaceConstants) -> None:
    """One step of parameters whose average is a single buffer: everything is read and written once.

    The result is that of :func:`lagless.updates.pulled_adamw` in the type of the tensors, bit for bit but for the
    square root: it is rounded correctly here, and by torch to one unit in the last place.

    Args:
        rows: weights, gradient, first moment, second moment, average of each parameter, as :func:`fits_call` wants
            them; modified in place.
        k: numbers.
    """
    library, dtype = _library(), rows[0][0].dtype
    assert library is not None
    function = library.pace_float32 if dtype == torch.float32 else library.pace_float64
    sizes = np.array([row[0].numel() for row in rows], dtype=np.int64)
    addresses = np.array([[tensor.data_ptr() for tensor in row] for row in rows], dtype=np.uintp)
    constants = np.array(k, dtype=_TYPES[dtype])
    threads = max(1, min(torch.get_num_threads(), int(sizes.sum()) // _FEWEST))
    function(len(rows), sizes.ctypes.data, addresses.ctypes.data, constants.ctypes.data, threads)
    for row in rows:
        increment_version(row[0])  # autograd notices changed weights only through the tensors it knows


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled step; None where there is no working compiler."""
    library = compile_source(_SOURCE, _FLAGS)
    if library is not None:
        for function in (library.pace_float32, library.pace_float64):
            function.argtypes = [ctypes.c_size_t, *[ctypes.c_void_p] * 3, ctypes.c_size_t]
            function.restype = None
    return library
