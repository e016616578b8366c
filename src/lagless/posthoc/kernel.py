"""The product of a few short rows as a C kernel, compiled at first use by the machine's own compiler.

A matrix this small keeps a BLAS busy with packing: ours is 2.4 times as fast (``benchmarks/product.py``).
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("product.c")
# Vectors are written out. What a compiler adds for a processor, like vectorised sums or products apart from their sums,
# would round the last columns differently from the others.
_FLAGS = ("-O3", "-march=native", "-mtune=generic", "-fno-tree-vectorize", "-shared", "-fPIC")
_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p


def multiply(weights: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """``out ← weights · x``, shapes (G, N), (N, C) and (G, C), float32 or float64; rows without gaps.

    Without a C compiler, which the environment variable ``CC`` may name, it is ``torch.mm``.
    """
    library = _library()
    if library is None:
        return torch.mm(weights, x, out=out)
    rows, columns = weights.shape
    function = library.product_float32 if x.dtype == torch.float32 else library.product_float64
    function(rows, columns, x.shape[1], weights.data_ptr(), x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0))
    return out


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no working compiler.

    It is compiled for this very processor in a tenth of a second, so nothing is kept that another machine with the same
    home folder could pick up.
    """
    compiler = os.environ.get("CC", "cc").split()
    with tempfile.TemporaryDirectory(prefix="lagless-") as folder:
        target = Path(folder, "product.so")
        try:
            subprocess.run([*compiler, *_FLAGS, str(_SOURCE), "-o", str(target)], check=True, capture_output=True)
            library = ctypes.CDLL(str(target))
        except (OSError, subprocess.CalledProcessError):
            return None
    for function in (library.product_float32, library.product_float64):
        function.argtypes = [_SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE]
        function.restype = None
    return library
