"""Hooks that see each gradient that ordinary ``backward()`` calls add to parameters."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from lagless.execution import local, watch_gradient, without_autocast


class Receiver(Protocol):
    """What is told about gradients."""

    def settle(self) -> None:
        """Look at what was accumulated so far: a gradient is about to be added to it."""
        ...

    def receive(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """Take in a gradient that was added to ``parameter.grad``; None where it is all of it."""
        ...


class GradientHooks:
    """Hooks on parameters; they hold no reference that would keep ``receiver`` alive.

    Args:
        receiver: is told about every gradient that is accumulated.

    Attributes:
        paused: whether gradients that arrive are of no microbatch.
    """

    def __init__(self, receiver: Receiver) -> None:
        self.paused = False
        self._receiver = weakref.ref(receiver)
        self._handles: list[Any] = []
        self._incoming: dict[Tensor, Tensor | None] = {}
        # p.grad and its values, of parameters whose gradients arrive accumulated.
        self._accumulated: dict[Tensor, tuple[TensorWeakRef, Tensor]] = {}

    def follow(self, parameter: Tensor) -> None:
        """Tell the receiver about gradients of ``parameter``."""
        owner = weakref.ref(self)

        def before(gradient: Tensor) -> None:
            if (alive := owner()) is not None and not alive.paused:
                alive._comes(parameter, gradient)

        def after(_: Tensor) -> None:
            if (alive := owner()) is not None and not alive.paused:
                with without_autocast((parameter.device,)):
                    alive._arrived(parameter)

        wanted = parameter.requires_grad
        parameter.requires_grad_(True)  # those that are frozen for now take no hooks
        self._handles += watch_gradient(parameter, before, after)
        parameter.requires_grad_(wanted)

    def forget(self) -> None:
        """Let go of gradients."""
        self._incoming.clear()  # torch.autograd.grad fills it and leaves it
        self._accumulated.clear()

    def forget_accumulated(self) -> None:
        """Let go of gradients of former passes; those of the pass at work stay."""
        self._accumulated.clear()

    def remove(self) -> None:
        """Stop following all parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def _comes(self, parameter: Tensor, gradient: Tensor) -> None:
        receiver = self._receiver()
        if receiver is not None:
            receiver.settle()
        # Where p.grad is empty, autograd may make the incoming tensor p.grad itself, unless it is held here.
        self._incoming[parameter] = None if parameter.grad is None else gradient

    def _arrived(self, parameter: Tensor) -> None:
        receiver, grad = self._receiver(), parameter.grad
        if receiver is None or grad is None:
            return
        seen = parameter in self._incoming  # FSDP sets gradients without autograd's leaf hooks
        gradient = self._incoming.pop(parameter, None)
        accumulated = local(grad)  # without its graph, if it has one
        if not seen:
            former = self._accumulated.get(parameter)
            if former is not None and former[0]() is grad:
                gradient = accumulated - former[1]
        receiver.receive(parameter, gradient)
        if not seen:
            self._accumulated[parameter] = TensorWeakRef(grad), accumulated.clone()
