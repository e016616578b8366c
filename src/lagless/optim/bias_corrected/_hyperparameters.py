"""Checks of a parameter group's hyperparameters; comparisons are written so that NaN fails."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


def require(optimizer: Optimizer, group: dict[str, Any], name: str, good: bool, allowed: str) -> None:
    """Refuse ``group[name]`` unless it is ``good``."""
    if not good:
        raise ValueError(f"{type(optimizer).__name__}: {name}={group[name]!r}; it must be {allowed}.")


def require_nonnegative(optimizer: Optimizer, group: dict[str, Any], *names: str) -> None:
    """Require finite numbers ≥ 0."""
    for name in names:
        require(optimizer, group, name, 0.0 <= float(group[name]) < float("inf"), "a finite number >= 0")


def require_positive(optimizer: Optimizer, group: dict[str, Any], *names: str) -> None:
    """Require finite numbers > 0, or None for no limit."""
    for name in names:
        value = group[name]
        require(optimizer, group, name, value is None or 0.0 < value < float("inf"), "a number > 0 or None")


def require_betas(optimizer: Optimizer, group: dict[str, Any], name: str = "betas") -> None:
    """Require β₁ and β₂ in [0, 1)."""
    betas = group[name]
    require(optimizer, group, name, len(betas) == 2 and all(0.0 <= b < 1.0 for b in betas), "two numbers in [0, 1)")


def require_steps(optimizer: Optimizer, group: dict[str, Any], name: str, minimum: int = 0) -> None:
    """Require a whole number of steps."""
    value = group[name]
    good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(optimizer, group, name, good, f"an integer >= {minimum}")
