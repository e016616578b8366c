"""An optimizer around another one: which can be wrapped, and how the two share groups and state."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lagless.optim._averaged import AveragedOptimizer
from lagless.optim._loaded_state import Entry, counter
from lagless.optim._wrapped_state import Kept, check_settings, kept_by


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


class WrappingOptimizer(AveragedOptimizer):
    """An optimizer with an average around another one, whose parameter groups, settings and state are its own too.

    A subclass gives ``_check``, which requires the settings of a group to be in range.

    Args:
        optimizer: the one that steps.
        settings: of this wrapper, with their defaults; groups of ``optimizer`` may set others.
    """

    step_key = "average_step"

    def __init__(self, optimizer: Optimizer, settings: dict[str, Any]) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:  # all of them, before the first one is given settings
            self._check({**settings, **group})
        super().__init__(optimizer.param_groups, {**optimizer.defaults, **settings})
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own.

        Raises:
            ValueError: if a setting is out of range.
        """
        self._check({**self.defaults, **param_group})
        if self.param_groups is not self.optimizer.param_groups:  # torch's constructor hands over what there is
            super().add_param_group(param_group)
            return
        settings = {k: v for k, v in self.defaults.items() if k not in self.optimizer.defaults}
        self.optimizer.add_param_group({**settings, **param_group})

    def _check(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _check_loaded(self, group: dict[str, Any]) -> None:
        self._check(group)
        check_settings(self.optimizer, group)

    def _wrapped(self) -> list[Optimizer]:
        return [self.optimizer]

    def _stepped_dtype(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype of the weights that the wrapped optimizer sees."""
        return parameter.dtype

    def _kept(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Kept:
        return kept_by(self.optimizer, group, parameter, self._stepped_dtype(parameter), state)

    def _is_averaged(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> bool:
        """Return whether ``state`` has anything of this wrapper's: the optimizer may have one before any step."""
        return not {self.step_key, *super()._entries_of(parameter, group, state)}.isdisjoint(state)

    def _entries_of(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Entry]:
        own = super()._entries_of(parameter, group, state)
        if not self._is_averaged(parameter, group, state):
            own = {name: entry._replace(needed=False) for name, entry in own.items()}
        return {**self._kept(parameter, group, state).entries, **own}

    def _counters(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> list[str]:
        own = [self.step_key] if self._is_averaged(parameter, group, state) else []
        return [*self._kept(parameter, group, state).counters, *own]

    def _counter(self, name: str, step: Any, parameter: Tensor, group: dict[str, Any]) -> Any:
        if name == self.step_key:
            return int(step)
        device = self.state[parameter][name].device if isinstance(self.state[parameter][name], Tensor) else None
        return counter(step, device or torch.device("cpu"))
