"""One step of primal averaging around AdamW over all tensors of the host by one call into C, compiled at first use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lagless.execution._c import in_memory, row_functions, run_rows
from lagless.updates import PrimalConstants


class PrimalRow(NamedTuple):
    """The tensors of one parameter whose average is recovered from y and z; the order is that of ``primal.c``."""

    weights: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    iterate: Tensor


def fits_primal_c(row: Sequence[Tensor]) -> bool:
    """Whether the tensors lie on the host, without gaps and in one type, and there is a C compiler."""
    return in_memory(row) and _library() is not None


def primal_step_c(rows: Sequence[PrimalRow], k: PrimalConstants) -> None:
    """One step of parameters of which y and z are kept: everything is read and written once.

    The result is that of :func:`lagless.updates.primal_adamw` in the type of the tensors, bit for bit but for the
    square root: it is rounded correctly here, and by torch to one unit in the last place.

    Args:
        rows: one per parameter, as :func:`fits_primal_c` wants them; all but gradients are modified in place.
        k: numbers; the order of the fields is that of ``primal.c``.
    """
    library = _library()
    assert library is not None
    run_rows(library, rows, len(PrimalRow._fields), k)


@functools.cache
def _library() -> dict[torch.dtype, Callable[..., None]] | None:
    """By type; None where there is no working compiler."""
    return row_functions("primal.c", "primal")
