"""What parameters show: the weights that train, or others that stand in their place for a while.

An Averager puts averages into parameters, and so does an optimizer with an evaluation mode. Whoever reads weights
meanwhile would take these for the trained ones. So everybody who swaps weights says so here, and everybody who needs
the trained ones asks here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lagless.execution._sharding import local
from lagless.execution._turns import Turns

Hook = TypeVar("Hook", bound=Callable[..., None])

LIVE = "live"
"""Where the state of a parameter has its trained weights while the parameter shows others."""


class PendingCopies(Protocol):
    """Copies of weights that are still being made."""

    def release(self) -> None:
        """Return when the weights may change."""


class StepObserver(Protocol):
    """Somebody who looks at optimizers before they step."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Look at ``optimizer``; an error keeps it from stepping."""


@dataclass(eq=False)
class _Hold:
    """Parameters that show an average for the length of a block, and what to call it."""

    what: str
    keys: set[Hashable]
    tensors: Sequence[Tensor]  # keeps the keys of these from being given to others


_HOLDS: list[_Hold] = []
_OPTIMIZERS: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_COPIES: weakref.WeakSet[Any] = weakref.WeakSet()
_OBSERVERS: weakref.WeakSet[Any] = weakref.WeakSet()


def follow_optimizer(optimizer: object) -> None:
    """Look at ``optimizer`` whenever trained weights are needed, if it has an evaluation mode."""
    switches = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    if switches and isinstance(optimizer, Optimizer):
        _OPTIMIZERS.add(optimizer)


@cache
def follow_optimizers() -> None:
    """Look at every optimizer that steps from now on, and have its steps wait for copies under way and for its turn."""

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        follow_optimizer(optimizer)
        for observer in tuple(_OBSERVERS):
            observer.before_step(optimizer)
        if isinstance(turns := getattr(optimizer, "turns", None), Turns):
            turns.begin_step()
        _release()

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        if isinstance(turns := getattr(optimizer, "turns", None), Turns):
            turns.end_step()

    register_optimizer_step_pre_hook(untraced(before_step))
    register_optimizer_step_post_hook(untraced(after_step))


def untraced(hook: Hook) -> Hook:
    """Return a hook that ``torch.compile`` calls, and does not trace, where it traces an optimizer's step.

    ``torch.compiler.disable`` does as much, and loads the compiler.
    """
    hook._torchdynamo_disable = True  # type: ignore[attr-defined]
    return hook


def observe_steps(observer: StepObserver) -> None:
    """Have ``observer`` called before every step of every optimizer, as long as it is alive."""
    follow_optimizers()
    _OBSERVERS.add(observer)


def wait_for_copies(copies: PendingCopies) -> None:
    """Have every step of an optimizer and every swap of weights wait until ``copies`` are made."""
    follow_optimizers()
    _COPIES.add(copies)


@contextmanager
def writing_weights() -> Generator[None]:
    """Swap weights inside the block: copies under way are waited for, and no cast of the former weights survives.

    Inside an autocast region torch keeps the weights' low-precision casts, and does not see that they have changed.
    """
    _release()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def showing(tensors: Iterable[Tensor], what: str) -> Generator[None]:
    """Say that ``tensors`` show ``what`` inside the block."""
    tensors = list(tensors)
    hold = _Hold(what, {key for tensor in tensors for key in _keys(tensor)}, tensors)
    _HOLDS.append(hold)
    try:
        yield
    finally:
        _HOLDS.remove(hold)


@contextmanager
def keeping_modes(tensors: Iterable[Tensor]) -> Generator[None]:
    """Switch optimizers of ``tensors`` back if the block switches their evaluation mode.

    That changes the tensors. Restore them afterwards.
    """
    modes = [(optimizer, _evaluates(optimizer)) for optimizer in tuple(_OPTIMIZERS)]
    try:
        yield
    finally:
        switched = [(optimizer, mode) for optimizer, mode in modes if _evaluates(optimizer) != mode]
        tensors = list(tensors) if switched else []
        for optimizer, mode in switched:
            if _positions(optimizer, tensors):
                _switch(optimizer, mode)


def require_own_weights(tensors: Iterable[Tensor], action: str) -> None:
    """Refuse ``action`` while an average is in ``tensors`` for the length of somebody's block.

    Raises:
        RuntimeError: saying whose.
    """
    if (what := shown_average(tensors)) is not None:
        raise RuntimeError(f"cannot {action} while {what} is in these parameters; leave its applied() block first.")


def shown_average(tensors: Iterable[Tensor]) -> str | None:
    """Return what to call the average that is in ``tensors`` for the length of somebody's block; None without one."""
    if not _HOLDS:
        return None
    keys = {key for tensor in tensors for key in _keys(tensor)}
    return next((hold.what for hold in _HOLDS if not keys.isdisjoint(hold.keys)), None)


def evaluating_optimizers(tensors: Iterable[Tensor]) -> list[Optimizer]:
    """Return the optimizers in evaluation mode that step any of ``tensors``."""
    evaluating = [optimizer for optimizer in tuple(_OPTIMIZERS) if _evaluates(optimizer)]
    if not evaluating:
        return []
    tensors = list(tensors)
    return [optimizer for optimizer in evaluating if _positions(optimizer, tensors)]


def require_training_mode(tensors: Iterable[Tensor], action: str, except_for: Optimizer | None = None) -> None:
    """Refuse ``action`` while an optimizer shows weights for evaluation in ``tensors``.

    Raises:
        RuntimeError: naming the optimizer's class.
    """
    for optimizer in evaluating_optimizers(tensors):
        if optimizer is not except_for:
            raise RuntimeError(
                f"cannot {action} while {type(optimizer).__name__} is in evaluation mode and these parameters show "
                "other weights than it trains; call its train() first."
            )


@torch.no_grad()
def trained_weights(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return, for each of ``tensors``, the tensor that has its trained weights: itself, unless it shows others.

    Parameters and optimizers are afterwards as before, bit for bit.
    """
    trained = list(tensors)
    for optimizer in evaluating_optimizers(tensors):
        positions = _positions(optimizer, tensors)
        kept = [LIVE in optimizer.state.get(parameter, {}) for parameter, _ in positions]
        if "evaluating" in optimizer.param_groups[0]:
            for (parameter, i), live in zip(positions, kept, strict=True):
                trained[i] = optimizer.state[parameter][LIVE] if live else trained[i]
            continue
        # Other optimizers compute the trained weights from the shown ones, and these from those with rounding.
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        bits = [local(p).clone() for p in everything]
        _switch(optimizer, False)
        try:
            for _, i in positions:
                trained[i] = tensors[i].detach().clone()
        finally:
            _switch(optimizer, True)
            for parameter, shown in zip(everything, bits, strict=True):
                local(parameter).copy_(shown)
    return trained


def leave_evaluation(tensors: Iterable[Tensor]) -> None:
    """Switch optimizers that show other weights in ``tensors`` to training."""
    for optimizer in evaluating_optimizers(tensors):
        _switch(optimizer, False)


def _release() -> None:
    for copies in tuple(_COPIES):
        copies.release()


def _switch(optimizer: Any, evaluate: bool) -> None:
    optimizer.eval() if evaluate else optimizer.train()


def _evaluates(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` is one of ours, or of schedule-free's package, in evaluation mode."""
    return any(group.get("evaluating") or group.get("train_mode") is False for group in optimizer.param_groups) and (
        len(optimizer.state) > 0
    )


def _positions(optimizer: Optimizer, tensors: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """The optimizer's parameters that are among ``tensors``, each with every place there."""
    places: dict[Hashable, list[int]] = {}
    for i, tensor in enumerate(tensors):
        for key in _keys(tensor):
            places.setdefault(key, []).append(i)
    found: list[tuple[Tensor, int]] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found += [(parameter, i) for i in sorted({i for key in _keys(parameter) for i in places.get(key, ())})]
    return found


def _keys(tensor: Tensor) -> Iterator[Hashable]:
    """What is equal for two tensors that are one object, or begin at the same memory."""
    yield "object", id(tensor)
    part = local(tensor)
    if part.numel() and part.device.type != "meta":
        yield "memory", part.device, part.data_ptr()
