"""The Trainer whose event a callback is answering.

A callback is handed the model and the optimizer, never the Trainer, nor what the Trainer was called with; yet only the
Trainer can evaluate as it does itself, and only its arguments say which checkpoint it resumes from. It stands further
up the stack, as the ``self`` of whoever raised the event. Looking there changes nothing about it, needs no argument
from users, and cannot go stale: it is the Trainer that calls now, whichever ran before.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback


def calling_trainer(callback: TrainerCallback, *arguments: str) -> tuple[Trainer, list[Any]]:
    """The Trainer that raised the event which ``callback`` answers, and variables of the method that did.

    Args:
        callback: one of the Trainer's callbacks, in an event.
        arguments: local variables of the method; the nearest method that has all of them is meant.

    Raises:
        RuntimeError: if no Trainer with this callback is calling.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        variables = frame.f_locals
        trainer = variables.get("self")
        if isinstance(trainer, Trainer) and callback in trainer.callback_handler.callbacks:
            if all(name in variables for name in arguments):
                return trainer, [variables[name] for name in arguments]
        frame = frame.f_back
    wanted = f" in a method with {', '.join(arguments)}" if arguments else ""
    raise RuntimeError(
        f"{type(callback).__name__} finds no Trainer that calls it{wanted}; give it to a transformers.Trainer (with "
        "evaluate=[], if that evaluates in a way of its own), or follow the optimizer with "
        "lagless.Averager(...).attach(optimizer) instead."
    )
