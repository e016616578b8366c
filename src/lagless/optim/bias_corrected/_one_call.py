"""One step of Adam, plain or leave-one-out, by one call into C, compiled at first use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lagless.native import REALS, Rows, compile_source, in_memory
from lagless.updates import DERIVED, AdamForm

# Contracted products would make an element's value depend on where the compiler leaves off using vectors.
_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-lm")
_FORMS = {("none", "none"): 0, ("leave_one_out", "none"): 1, ("leave_one_out", "jackknife"): 2}


def fits_call(form: AdamForm, row: Sequence[Tensor]) -> bool:
    """Whether C knows the form, and the tensors lie on the host, without gaps and in one type, and there is a compiler.

    Args:
        form: of the update.
        row: weights, gradient, first and second moment, sums over microbatches.
    """
    known = (form.cross_fit, form.inverse_correction) in _FORMS and form.constants == DERIVED
    sums = 1 if form.cross_fit == "leave_one_out" else 0
    return known and len(row) == 4 + sums and in_memory(row) and _library() is not None


def step_in_one_call(form: AdamForm, row: Sequence[Tensor], numbers: Sequence[Any]) -> None:
    """One step of one parameter, of which everything is read once and written once.

    The result is that of :func:`lagless.updates.adam_folds` with two nodes up to rounding.

    Args:
        form: as :func:`fits_call` wants it.
        row: likewise; the last is Σ g_j², but for a plain step. All but it and the gradient are modified in place.
        numbers: 1 - lr·λ, lr, ε, 1 - β₁, 1 - β₂, :class:`~lagless.updates.EmaWeights`, n - 1, what turns the sum into a
            mean square in units of the gradient, and the largest update, or infinity.
    """
    library, dtype = _library(), row[0].dtype
    assert library is not None
    function = library.adam_float32 if dtype == torch.float32 else library.adam_float64
    given, constants = Rows([row]), np.array(numbers, dtype=REALS[dtype])
    number = _FORMS[form.cross_fit, form.inverse_correction]
    function(number, given.sizes, given.addresses, constants.ctypes.data, given.threads)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled step; None where there is no working compiler."""
    library = compile_source("adam.c", _FLAGS)
    if library is not None:
        for function in (library.adam_float32, library.adam_float64):
            function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_size_t]
            function.restype = None
    return library
