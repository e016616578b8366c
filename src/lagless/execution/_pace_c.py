"""One step of PACE over all tensors of the host by one call into C, compiled at first use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lagless.execution._c import in_memory, row_functions, run_rows
from lagless.updates import PaceConstants


class PaceRow(NamedTuple):
    """The tensors of one parameter whose average is a single buffer; the order is that of ``pace.c``."""

    weights: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    average: Tensor


def fits_pace_c(row: Sequence[Tensor]) -> bool:
    """Whether the tensors lie on the host, without gaps and in one type, and there is a C compiler."""
    return in_memory(row) and _library() is not None


def pace_step_c(rows: Sequence[PaceRow], k: PaceConstants) -> None:
    """One step of parameters whose average is a single buffer: everything is read and written once.

    The result is that of :func:`lagless.updates.pulled_adamw` in the type of the tensors, bit for bit but for the
    square root: it is rounded correctly here, and by torch to one unit in the last place.

    Args:
        rows: one per parameter, as :func:`fits_pace_c` wants them; all but gradients are modified in place.
        k: numbers; the order of the fields is that of ``pace.c``.
    """
    library = _library()
    assert library is not None
    run_rows(library, rows, len(PaceRow._fields), k)


@functools.cache
def _library() -> dict[torch.dtype, Callable[..., None]] | None:
    """By type; None where there is no working compiler."""
    return row_functions("pace.c", "pace")
