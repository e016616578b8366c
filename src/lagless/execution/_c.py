"""C sources of the package, compiled at first use by the machine's own compiler."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

_log = logging.getLogger("lagless")
_LOCK = threading.Lock()
SWITCH = "LAGLESS_C"
"""Environment variable that turns C off."""
NO_FMA = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-lm")
"""Flags for elementwise formulas. Contracted products would make a value depend on where vectors leave off."""
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_FEWEST = 1 << 16  # elements per thread; starting one takes as long as some ten thousand elements

REALS: dict[torch.dtype, type[np.floating[Any]]] = {torch.float32: np.float32, torch.float64: np.float64}
"""Types that the C sources know."""


def compile_source(name: str, flags: Sequence[str]) -> ctypes.CDLL | None:
    """Return the functions of a C file, or None without a working compiler, which the variable ``CC`` may name.

    They are compiled for this very processor in a fraction of a second, once per process, so nothing is kept that
    another machine with the same home folder could pick up. The variable ``LAGLESS_C=0``, set before the first use,
    turns C off without a word.
    """
    if (wanted := os.environ.get(SWITCH, "1")) not in ("0", "1"):
        raise ValueError(f"{SWITCH}={wanted!r}; set it to 0 to do without C, or to 1, the default.")
    if wanted == "0":
        return None
    with _LOCK:
        return _compile(name, tuple(flags), os.environ.get("CC") or "cc")


def functions(
    source: str, name: str, flags: Sequence[str], arguments: Sequence[Any]
) -> dict[torch.dtype, Callable[..., None]] | None:
    """``name_float32`` and ``name_float64`` of a C file, by type; None without a working compiler."""
    library = compile_source(source, flags)
    if library is None:
        return None
    found: dict[torch.dtype, Any] = {
        dtype: getattr(library, f"{name}_{real.__name__}") for dtype, real in REALS.items()
    }
    for function in found.values():
        function.argtypes, function.restype = list(arguments), None
    return found


@functools.cache
def _compile(name: str, flags: tuple[str, ...], compiler: str) -> ctypes.CDLL | None:
    source = Path(__file__).parent / "c" / name
    try:
        with tempfile.TemporaryDirectory(prefix="lagless-", ignore_cleanup_errors=True) as folder:
            target = Path(folder, source.with_suffix(".so").name)
            # The flags come last: libraries are searched for what is asked for before them.
            command = [*shlex.split(compiler), *_FLAGS, str(source), "-o", str(target), *flags]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(target))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:  # ValueError: an open quote in CC
        _log.info("%s is not compiled: %s %s", name, error, getattr(error, "stderr", ""))
        _warn_once(compiler)
        return None


@functools.cache
def _warn_once(compiler: str) -> None:
    warnings.warn(
        f"the C compiler {compiler!r} does not work, so averages and optimizers on the CPU run on slower code; the log "
        "'lagless' has its message at level INFO. Results may differ from those of C in the last bit: replicas of one "
        "run should all have a compiler, or none. Install one or name it in CC; the environment variable "
        f"{SWITCH}=0 turns C off, and this warning.",
        RuntimeWarning,
        stacklevel=2,
    )


def threads_for(elements: int) -> int:
    """How many threads are worth starting."""
    return max(1, min(torch.get_num_threads(), elements // _FEWEST))


def in_memory(row: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape lie on the host, without gaps and in one type that C knows."""
    dtype = row[0].dtype
    return dtype in REALS and all(t.dtype == dtype and t.is_cpu and is_plain(t) and t.is_contiguous() for t in row)


def is_plain(tensor: Tensor) -> bool:
    """Whether the values are what lies in memory: not computed by a subclass, negated when read, or zeros left out.

    Memory of a file or of bytes may begin anywhere, but a number in C only at a multiple of its size.
    """
    values = type(tensor) in (Tensor, Parameter) and not tensor.is_neg() and not tensor._is_zerotensor()
    return values and tensor.layout == torch.strided and tensor.data_ptr() % tensor.itemsize == 0


def _require_alike(rows: Sequence[Sequence[Tensor]], width: int) -> None:
    """Refuse rows that C would read or write in the wrong places."""
    for number, row in enumerate(rows):
        shape = row[0].shape
        alike = len(row) == width and row[0].dtype == rows[0][0].dtype
        if not alike or not in_memory(row) or any(tensor.shape != shape for tensor in row):
            found = ", ".join(f"{t.dtype} {tuple(t.shape)} {t.layout} on {t.device}" for t in row)
            raise ValueError(
                f"row {number} of {len(rows)} for C holds {found}; it must hold {width} contiguous "
                f"{rows[0][0].dtype} tensors of shape {tuple(shape)} on the CPU. If the first is a parameter, a tensor "
                "of its state or its gradient has another shape: load a state that was saved for this model."
            )


class TensorTable:
    """Tensors of several parameters as ``parallel.h`` takes them; they must outlive this.

    Args:
        rows: tensors of each parameter, as :func:`in_memory` wants them; all of one type.
        width: tensors per row that the C function reads.

    Attributes:
        sizes: address of the elements per tensor.
        addresses: address of the tensors' addresses.
        threads: how many are worth starting.

    Raises:
        ValueError: if the tensors of a row differ in shape, or any is not as :func:`in_memory` wants it. C sees only
            addresses and the size of the first tensor: it would read and write past a smaller one.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor]], width: int) -> None:
        _require_alike(rows, width)
        self._sizes: NDArray[np.int64] = np.array([row[0].numel() for row in rows], dtype=np.int64)
        self._addresses = np.array([[tensor.data_ptr() for tensor in row] for row in rows], dtype=np.uintp)
        self.sizes, self.addresses = self._sizes.ctypes.data, self._addresses.ctypes.data
        self.threads = threads_for(int(self._sizes.sum()))


def row_functions(source: str, name: str) -> dict[torch.dtype, Callable[..., None]] | None:
    """The functions that ``RUN_ROWS`` of ``parallel.h`` makes in a C file, by type; None without a compiler."""
    return functions(source, name, NO_FMA, [ctypes.c_size_t, *[ctypes.c_void_p] * 3, ctypes.c_size_t])


def run_rows(
    library: dict[torch.dtype, Callable[..., None]], rows: Sequence[Sequence[Tensor]], width: int, constants: Any
) -> None:
    """Call the function of :func:`row_functions` that fits the tensors.

    Args:
        library: the functions.
        rows: tensors of each parameter, the first of which autograd follows.
        width: tensors per row that the function reads.
        constants: numbers, as the function takes them.
    """
    dtype = rows[0][0].dtype
    given, numbers = TensorTable(rows, width), np.array(constants, dtype=REALS[dtype])
    library[dtype](len(rows), given.sizes, given.addresses, numbers.ctypes.data, given.threads)
    for row in rows:
        increment_version(row[0])  # autograd notices changed weights only through the tensors it knows
