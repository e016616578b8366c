"""One step of Adam, plain or leave-one-out, by one call into C, compiled at first use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lagless.execution._c import NO_FMA, REALS, TensorTable, functions, in_memory
from lagless.updates import DERIVED, AdamForm

_FORMS = {("none", "none"): 0, ("leave_one_out", "none"): 1, ("leave_one_out", "jackknife"): 2}


class AdamRow(NamedTuple):
    """The tensors of one parameter, in the order of ``adam.c``; ``squares`` is Σ g_j², None for a plain step."""

    weights: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    squares: Tensor | None = None


class AdamConstants(NamedTuple):
    """The numbers of one step, in the order of ``adam.c``.

    Attributes:
        decay: 1 - lr·λ.
        rate: lr.
        eps: ε.
        first: 1 - β₁.
        second: 1 - β₂.
        m_old: of :class:`~lagless.updates.EmaWeights`, as the next three.
        m_new: likewise.
        v_old: likewise.
        v_new: likewise.
        others: n - 1, the number of microbatches but one.
        scale: what turns the sum of squares into a mean square in units of the gradient.
        largest: the largest |update|; infinity for no limit.
    """

    decay: float
    rate: float
    eps: float
    first: float
    second: float
    m_old: float
    m_new: float
    v_old: float
    v_new: float
    others: float
    scale: float
    largest: float


def fits_adam_c(form: AdamForm, row: Sequence[Tensor]) -> bool:
    """Whether C knows the form, and the tensors lie on the host, without gaps and in one type, and there is a compiler.

    Args:
        form: of the update.
        row: the fields of an :class:`AdamRow`, without those that are None.
    """
    known = (form.cross_fit, form.inverse_correction) in _FORMS and form.constants == DERIVED
    sums = 1 if form.cross_fit == "leave_one_out" else 0
    return known and len(row) == 4 + sums and in_memory(row) and _library() is not None


def adam_step_c(form: AdamForm, row: AdamRow, constants: AdamConstants) -> None:
    """One step of one parameter, of which everything is read once and written once.

    The result is that of :func:`lagless.updates.adam_folds` with two nodes up to rounding.

    Args:
        form: as :func:`fits_adam_c` wants it.
        row: likewise; modified in place, but for the gradient and the sum of squares.
        constants: numbers.
    """
    library, dtype = _library(), row.weights.dtype
    assert library is not None
    tensors = [tensor for tensor in row if tensor is not None]
    plain = form.cross_fit != "leave_one_out"
    given = TensorTable([tensors], len(AdamRow._fields) - plain)
    numbers = np.array(constants, dtype=REALS[dtype])
    number = _FORMS[form.cross_fit, form.inverse_correction]
    library[dtype](number, given.sizes, given.addresses, numbers.ctypes.data, given.threads)


@functools.cache
def _library() -> dict[torch.dtype, Callable[..., None]] | None:
    """By type; None where there is no working compiler."""
    return functions("adam.c", "adam", NO_FMA, [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_size_t])
