"""An Averager whose live tensors may be replaced between steps, as the interfaces of other libraries allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from lagless.averaging import Averager
from lagless.rules import Rule, ticks

NAME = "average"


class FollowingAverager:
    """One average of named tensors that are handed over at every update.

    The Averager belongs to the tensors it was made of. If others of the same names are handed over, a new one takes
    over its state: examples are a model built twice, the second time for the average, and a model that was wrapped.

    Args:
        tensors: at the start: their values are θ_0.
        rule: the averaging rule.
        step: optimizer steps already taken, for an average that begins with these values.
        device: where averages are kept; None for each tensor's own.
        dtype: of the stored average.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        rule: Rule,
        *,
        step: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.rule, self._device, self._dtype = rule, device, dtype
        self._tensors = dict(tensors)
        self._averager = self._make()
        if step:
            self._join(step)
        # An average that begins in the middle of a run has values before its first update.
        self._joined = {name: tensor.detach().clone() for name, tensor in tensors.items()} if step else {}

    @property
    def step(self) -> int:
        """Updates handed over so far."""
        return self._averager.step

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Count one step of these tensors."""
        self.bind(tensors)
        self._averager.update()
        self._joined = {}

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Follow these tensors from here on.

        Raises:
            ValueError: if they have other names or shapes than those before.
        """
        if all(self._tensors.get(name) is tensor for name, tensor in tensors.items()) and len(tensors) == len(
            self._tensors
        ):
            return
        if not self.step and tensors.keys() < self._tensors.keys():  # less trains than there is in the copy
            self._tensors = {name: self._tensors[name] for name in tensors}
            self._averager = self._make()
        before = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        now = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if before != now:
            differ = next(name for name in [*before, *now] if before.get(name) != now.get(name))
            raise ValueError(
                f"parameters: {differ} has shape {now.get(differ)}, and had {before.get(differ)} when the average "
                "began. Give the parameters of the same model in the same order."
            )
        self._tensors = dict(tensors)
        self._rebuild()

    def place(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Keep the average on another device, or in another type."""
        kept = None if dtype in (None, torch.float16, self._dtype) else dtype
        if (device is None or device == self._device) and kept is None:
            return
        self._device, self._dtype = device if device is not None else self._device, kept or self._dtype
        self._rebuild()

    def values(self) -> dict[str, Tensor]:
        """Return the average in the tensors' types; the values themselves before the first update."""
        if not self._averager.updates(NAME):
            return self._joined or {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        read = self._averager.read(NAME)
        return {name: read[name].to(tensor.dtype) for name, tensor in self._tensors.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the Averager's state."""
        return dict(self._averager.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the tensors need not be those of its step yet.

        Raises:
            ValueError: if it is one of another rule, or of other tensors.
        """
        self._averager.load_state_dict({"tensors": state["tensors"], "meta": state["meta"]}, check_live=False)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the state to a file."""
        self._averager.save(path)

    def load(self, path: str | PathLike[str]) -> None:
        """Take over the state in a file, as by :meth:`load_state_dict`."""
        self._averager.load(path, check_live=False)

    def _join(self, step: int) -> None:
        """Go on at ``step``, as if all updates until then had led to the present values."""
        state = self._averager.state_dict()
        last = deque(ticks(self.rule, range(step + 1)), maxlen=1)
        meta = {**state["meta"], "step": step}
        if last:
            meta["last"] = {NAME: last[0]._asdict()}
        self._averager.load_state_dict({**state, "meta": meta}, check_live=False)

    def _rebuild(self) -> None:
        state = self._averager.state_dict()
        self._averager = self._make()
        self._averager.load_state_dict(state, check_live=False)

    def _make(self) -> Averager:
        # Frozen parameters, as of a copy made for the average, count as tensors without a gradient.
        tensors = {name: tensor if tensor.requires_grad else tensor.detach() for name, tensor in self._tensors.items()}
        return Averager(tensors, {NAME: self.rule}, device=self._device, dtype=self._dtype)
