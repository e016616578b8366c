"""Checks of a state before an optimizer takes it over: a state of other shapes would be used on the wrong elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_STEPS = 2**53  # beyond it, a float64 count no longer grows by one

STATE_FORMAT = 1
"""What a state's ``"format"`` says; one without is of a version that did not number them, and is read like format 1."""


def with_format(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the number of its format."""
    return {**state, "format": STATE_FORMAT}


def require_known_format(state: Mapping[str, Any]) -> None:
    """Refuse a state of a format that this version does not know.

    Raises:
        ValueError: naming the format.
    """
    found = state.get("format", STATE_FORMAT)
    if isinstance(found, bool) or found != STATE_FORMAT:
        raise ValueError(
            f"the optimizer's state has format {found!r}; this lagless reads {STATE_FORMAT}. Update lagless."
        )


def require_fitting(
    parameter: object, state: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], step_key: str
) -> None:
    """Refuse entries of a parameter's state that have another shape or type than the optimizer works with.

    Args:
        parameter: its number or name, for the error.
        state: of the parameter; entries that ``shapes`` does not name are not looked at.
        shapes: wanted, by entry.
        step_key: entry that counts steps.

    Raises:
        ValueError: naming parameter, entry, what was found and what is wanted.
    """
    for key in shapes.keys() & state.keys():
        value, shape = state[key], tuple(shapes[key])
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r:.40}"
            _refuse(parameter, key, found, f"a floating-point tensor of shape {shape}")
        if tuple(value.shape) != shape:
            _refuse(parameter, key, f"of shape {tuple(value.shape)}", f"of shape {shape}")
    if step_key in state and not _is_count(state[step_key]):
        _refuse(parameter, step_key, f"{state[step_key]!r:.60}", f"a whole number in [0, {_MOST_STEPS}]")


def counter_dtype(step: Tensor) -> torch.dtype:
    """The type of a loaded step count: float32 or wider, since one in bfloat16 stops at 256 and in float16 at 2,048."""
    return torch.promote_types(step.dtype, torch.float32)


def _is_count(step: object) -> bool:
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_complex():
            return False
        step = step.item()
    return not isinstance(step, bool) and isinstance(step, int | float) and _is_whole(step)


def _is_whole(number: float) -> bool:
    return math.isfinite(number) and 0 <= number <= _MOST_STEPS and number == int(number)


def _refuse(parameter: object, key: str, found: str, wanted: str) -> None:
    raise ValueError(
        f"the state of parameter {parameter}: {key!r} is {found}; it must be {wanted}. Load a state that was saved for "
        "this model, with parameters in the same order, or start with a new state."
    )
