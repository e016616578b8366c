"""One step of Adam, plain or leave-one-out, by one call into C, compiled at first use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lagless.execution._c import NO_FMA, REALS, TensorTable, functions, in_memory
from lagless.updates import DERIVED, AdamForm

_FORMS = {("none", "none"): 0, ("leave_one_out", "none"): 1, ("leave_one_out", "jackknife"): 2}


def fits_adam_c(form: AdamForm, row: Sequence[Tensor]) -> bool:
    """Whether C knows the form, and the tensors lie on the host, without gaps and in one type, and there is a compiler.

    Args:
        form: of the update.
        row: weights, gradient, first and second moment, sums over microbatches.
    """
    known = (form.cross_fit, form.inverse_correction) in _FORMS and form.constants == DERIVED
    sums = 1 if form.cross_fit == "leave_one_out" else 0
    return known and len(row) == 4 + sums and in_memory(row) and _library() is not None


def adam_step_c(form: AdamForm, row: Sequence[Tensor], numbers: Sequence[Any]) -> None:
    """One step of one parameter, of which everything is read once and written once.

    The result is that of :func:`lagless.updates.adam_folds` with two nodes up to rounding.

    Args:
        form: as :func:`fits_adam_c` wants it.
        row: likewise; the last is Σ g_j², but for a plain step. All but it and the gradient are modified in place.
        numbers: 1 - lr·λ, lr, ε, 1 - β₁, 1 - β₂, :class:`~lagless.updates.EmaWeights`, n - 1, what turns the sum into a
            mean square in units of the gradient, and the largest update, or infinity.
    """
    library, dtype = _library(), row[0].dtype
    assert library is not None
    given, constants = (
        TensorTable([row], 5 if form.cross_fit == "leave_one_out" else 4),
        np.array(numbers, dtype=REALS[dtype]),
    )
    number = _FORMS[form.cross_fit, form.inverse_correction]
    library[dtype](number, given.sizes, given.addresses, constants.ctypes.data, given.threads)


@functools.cache
def _library() -> dict[torch.dtype, Callable[..., None]] | None:
    """By type; None where there is no working compiler."""
    return functions("adam.c", "adam", NO_FMA, [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_size_t])
