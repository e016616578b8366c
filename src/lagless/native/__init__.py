"""C sources of the package, compiled at first use by the machine's own compiler."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_FEWEST = 1 << 16  # elements per thread; starting one takes as long as some ten thousand elements

REALS = {torch.float32: np.float32, torch.float64: np.float64}
"""Types that the C sources know."""


def compile_source(name: str, flags: Sequence[str]) -> ctypes.CDLL | None:
    """The functions of a C file of this folder; None without a working compiler, which the variable ``CC`` may name.

    They are compiled for this very processor in a tenth of a second, so nothing is kept that another machine with the
    same home folder could pick up.
    """
    source = Path(__file__).with_name(name)
    compiler = os.environ.get("CC", "cc").split()
    with tempfile.TemporaryDirectory(prefix="lagless-") as folder:
        target = Path(folder, source.with_suffix(".so").name)
        try:
            # The flags come last: libraries are searched for what is asked for before them.
            subprocess.run(
                [*compiler, *_FLAGS, str(source), "-o", str(target), *flags], check=True, capture_output=True
            )
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.CalledProcessError):
            return None


def in_memory(row: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape lie on the host, without gaps and in one type that C knows."""
    dtype = row[0].dtype
    plain = all(type(t) in (Tensor, Parameter) and t.dtype == dtype and t.is_cpu and t.is_contiguous() for t in row)
    return plain and dtype in REALS


class Rows:
    """Tensors of several parameters as ``shares.h`` takes them; they must outlive this.

    Args:
        rows: tensors of each parameter, equally many, as :func:`in_memory` wants them; all of one type.

    Attributes:
        sizes: address of the elements per tensor.
        addresses: address of the tensors' addresses.
        threads: how many are worth starting.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor]]) -> None:
        self._sizes: NDArray[np.int64] = np.array([row[0].numel() for row in rows], dtype=np.int64)
        self._addresses = np.array([[tensor.data_ptr() for tensor in row] for row in rows], dtype=np.uintp)
        self.sizes, self.addresses = self._sizes.ctypes.data, self._addresses.ctypes.data
        self.threads = max(1, min(torch.get_num_threads(), int(self._sizes.sum()) // _FEWEST))
