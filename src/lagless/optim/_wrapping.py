"""Which optimizers can be wrapped by another one."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim import Optimizer

from lagless.optim._averaged import AveragedOptimizer


def check_base(optimizer: Any, wrapper: str) -> None:
    """Require an optimizer that ``wrapper`` can step.

    Raises:
        TypeError: if it is no optimizer, keeps an average itself, or evaluates closures as often as it likes.
        ValueError: if its groups have the settings of another wrapper.
    """
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, AveragedOptimizer):
        raise TypeError(f"{wrapper} wraps a torch.optim.Optimizer that keeps no average, not {optimizer!r}.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"{type(optimizer).__name__} evaluates its closure as often as it likes; {wrapper} wraps optimizers whose "
            "step() needs none."
        )
    if any("evaluating" in group for group in optimizer.param_groups):
        raise ValueError(
            f"this {type(optimizer).__name__} has the settings of another wrapper in its groups; make a new one."
        )
