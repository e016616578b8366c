"""Checks of what a user sets, shared by PACE and the wrapper."""

from __future__ import annotations

import math
from numbers import Real

import torch

from lagless.rules import Rule


def check_between(name: str, value: object, *, below: float = math.inf, positive: bool = False) -> None:
    """Require a number in [0, below), or in (0, below); NaN fails."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0.0 <= number < below or (positive and number == 0.0):
        limit = "finite" if math.isinf(below) else f"< {below:g}"
        raise ValueError(f"{name}={value!r}; it must be a number {'>' if positive else '>='} 0 and {limit}.")


def check_average(average: object) -> None:
    """Require an averaging rule."""
    if not isinstance(average, Rule):
        raise TypeError(f"average={average!r} is not an averaging rule; give e.g. lagless.EMA().")


def check_dtype(dtype: object) -> None:
    """Require a dtype in which averages are stored."""
    if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"average_dtype={dtype}; averages are stored as bfloat16, float32 or float64, or None.")
