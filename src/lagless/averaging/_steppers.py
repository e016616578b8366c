"""The optimizers that step averaged tensors, and those that step others instead."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from lagless.averaging._live import LiveTensors
from lagless.averaging._live_check import LiveCheck
from lagless.execution import Turns, local


@dataclass
class _Groups:
    """The groups of an optimizer when they were last compared: sizes, and how many tensors are averaged or not."""

    size: int
    ours: int
    others: int


class Steppers:
    """Notices when averaged tensors stop being those that an optimizer steps.

    Groups are compared when their size changes or averaged tensors have been replaced, so that steps stay cheap.

    Args:
        live: what is averaged.
        check: of the live weights beside a loaded state, made before they first step.
        turns: taken by every step of averaged tensors; the update that follows gives them back.
    """

    def __init__(self, live: LiveTensors, check: LiveCheck, turns: Turns) -> None:
        self._live, self._check, self._turns = live, check, turns
        self._known: weakref.WeakKeyDictionary[Optimizer, _Groups] = weakref.WeakKeyDictionary()
        self._ids = [id(tensor) for tensor in live.parameters()]
        self._versions = self._present_versions()
        self._ours_stepped, self._foreign = False, ""

    def require_ours(self, optimizer: Optimizer) -> None:
        """Refuse to follow an optimizer of other tensors.

        Raises:
            ValueError: if it steps none of the averaged ones.
        """
        if not self._look(optimizer).ours:
            name, *_ = self._live.names
            raise ValueError(
                f"this {type(optimizer).__name__} steps none of the {len(self._live.names)} averaged tensors, such as "
                f"{name}: it was made for another model or a copy, or load_state_dict(assign=True) has replaced them. "
                "Make model, optimizer and Averager in this order; or call update() after every step, where an "
                "optimizer steps copies and writes them back."
            )

    def before_step(self, optimizer: Optimizer) -> None:
        """Look at the groups of an optimizer that is about to step.

        Raises:
            RuntimeError: if it stepped averaged tensors only, and has others now; if it would move live weights that
                are not those of a loaded state; or while an average is in their place.
        """
        groups, before = _size(optimizer), self._known.get(optimizer)
        now = before if before is not None and before.size == groups else self._look(optimizer)
        if before is not None and before.ours and not before.others and now.others:
            self._known[optimizer] = before  # refused again at the next step
            raise RuntimeError(
                f"{now.others} parameters were added to {type(optimizer).__name__} that are not averaged; {_JOIN}"
            )
        if now.ours:
            with self._turns.between_reads():
                self._live.require_own("step the optimizer")
                self._check.require()
                self._turns.begin_step()
            self._ours_stepped = True
        else:
            self._foreign = type(optimizer).__name__

    def require_trained(self) -> None:
        """Refuse tensors that are not those which optimizers step; called at updates.

        Raises:
            RuntimeError: if they have been replaced, or only others were stepped since the last call.
        """
        ids = [id(tensor) for tensor in self._live.parameters()]
        if ids != self._ids:
            for optimizer, before in list(self._known.items()):
                if (now := self._look(optimizer)).ours < before.ours:
                    self._known[optimizer] = before
                    raise RuntimeError(
                        f"{before.ours - now.ours} averaged tensors were replaced after {type(optimizer).__name__} was "
                        "made, which goes on stepping the former ones. Make the optimizer anew, or load weights "
                        f"without assign=True; {_JOIN}"
                    )
            self._ids = ids
        versions = self._present_versions() if self._foreign else self._versions
        if self._foreign and not self._ours_stepped and versions == self._versions:
            name, *_ = self._live.names
            raise RuntimeError(
                f"{self._foreign} steps none of the averaged tensors, such as {name}, and nothing else has changed "
                "them since the last update: they are of a copy, or load_state_dict(assign=True) has replaced them; "
                f"{_JOIN}"
            )
        self._versions = versions
        self._ours_stepped, self._foreign = False, ""

    def _look(self, optimizer: Optimizer) -> _Groups:
        ours = {key for tensor in self._live.parameters() for key in _keys(tensor)}
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        count = sum(not ours.isdisjoint(_keys(p)) for p in stepped)
        groups = self._known[optimizer] = _Groups(_size(optimizer), count, len(stepped) - count)
        return groups

    def _present_versions(self) -> list[int]:
        return [-1 if tensor.is_inference() else tensor._version for tensor in self._live.parameters()]


_JOIN = "a new Averager(..., step=N) joins the run at step N."


def _size(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _keys(tensor: Tensor) -> Iterator[Hashable]:
    """What is equal for one tensor and another that shares its memory, as parts of flat buffers do."""
    yield id(tensor)
    if pointer := local(tensor).untyped_storage().data_ptr():
        yield "memory", pointer
