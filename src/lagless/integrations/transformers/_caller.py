"""The Trainer whose event a callback is answering, and what it was called with.

A callback is handed the model and the optimizer, never the Trainer, nor what the Trainer was called with; yet only the
Trainer can evaluate as it does itself, and only its arguments say which checkpoint it resumes from.

Somebody who binds the callback hands the Trainer over: its ``train`` and ``evaluate`` then note what they are called
with. Otherwise the Trainer is looked for further up the stack, as the ``self`` of whoever raised the event, and what
it was called with among the variables there, under the names in ``_compat``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from lagless.integrations.transformers._compat import callbacks_of


class BoundTrainer:
    """A Trainer that was handed over; its ``train`` and ``evaluate`` note what they are called with."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._calls: list[dict[str, Any]] = []
        trainer.train = self._noting(trainer.train)
        trainer.evaluate = self._noting(trainer.evaluate)

    def variables(self, arguments: tuple[str, ...]) -> list[Any] | None:
        """Return arguments of the innermost call that has all of them; None if there is none."""
        for call in reversed(self._calls):
            if all(name in call for name in arguments):
                return [call[name] for name in arguments]
        return None

    def _noting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        @wraps(method)
        def noting(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            call = dict(bound.arguments)
            if call.get("resume_from_checkpoint") is True:
                call["resume_from_checkpoint"] = get_last_checkpoint(str(self.trainer.args.output_dir))
            elif call.get("resume_from_checkpoint") is False:
                call["resume_from_checkpoint"] = None
            self._calls.append(call)
            try:
                return method(*args, **kwargs)
            finally:
                self._calls.pop()

        return noting


def calling_trainer(
    callback: TrainerCallback, *arguments: str, bound: BoundTrainer | None = None, state: TrainerState | None = None
) -> tuple[Trainer, list[Any]]:
    """Return the Trainer that raised the event which ``callback`` answers, and arguments of the method that did.

    Args:
        callback: one of the Trainer's callbacks, in an event.
        arguments: of the method; the nearest method that has all of them is meant.
        bound: the Trainer that the callback was bound to, if it was.
        state: of the event; tells whether the bound Trainer raised it.

    Raises:
        RuntimeError: if no Trainer with this callback is calling, or another one than the callback is bound to.
    """
    if bound is not None:
        if state is not None and state is not bound.trainer.state:
            raise RuntimeError(
                f"this {type(callback).__name__} is bound to one Trainer and called by another; make one for each."
            )
        if (values := bound.variables(arguments)) is not None:
            return bound.trainer, values
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        variables = frame.f_locals
        trainer = variables.get("self")
        if isinstance(trainer, Trainer) and callback in callbacks_of(trainer):
            if all(name in variables for name in arguments):
                return trainer, [variables[name] for name in arguments]
        frame = frame.f_back
    wanted = f" in a method with {', '.join(arguments)}" if arguments else ""
    raise RuntimeError(
        f"{type(callback).__name__} finds no Trainer that calls it{wanted}; give it to a transformers.Trainer (with "
        "evaluate=[], if that evaluates in a way of its own), or follow the optimizer with "
        "lagless.Averager(...).attach(optimizer) instead."
    )
