"""What lagless uses of transformers and TRL beyond their documented interfaces, and where their releases differ.

All of it is here. ``SEEN_IN`` are the releases in which it was found to work; the test of this module names what is
gone from another one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

SEEN_IN = ("4.57", "5.23")
"""Releases of transformers in which all of this was found to work."""

TRAIN_ARGUMENTS = ("resume_from_checkpoint",)
"""Variables of the method of the Trainer that raises ``on_train_begin``."""

EVALUATE_ARGUMENTS = ("eval_dataset", "ignore_keys", "metric_key_prefix")
"""Variables of the method of the Trainer that raises ``on_evaluate``."""


def callbacks_of(trainer: Trainer) -> list[TrainerCallback]:
    """Return the list of the Trainer's callbacks itself."""
    return trainer.callback_handler.callbacks


def save_quietly(trainer: Trainer, folder: Path) -> None:
    """Save the Trainer's model to a folder without pushing it to the hub; all processes take part."""
    trainer.save_model(str(folder), _internal_call=True)


def best_step(state: TrainerState) -> int | None:
    """Return the step of the best checkpoint; None if there is none.

    With ``save_strategy="best"`` transformers 4.57 leaves ``best_global_step`` empty, and names the checkpoint only.
    """
    if state.best_global_step is not None:
        return state.best_global_step
    match = re.search(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)$", str(state.best_model_checkpoint or "").rstrip("/"))
    return int(match[1]) if match else None


def close_progress_bar(trainer: Trainer) -> None:
    """End the bar of an evaluation, which counts on through the next one."""
    for callback in callbacks_of(trainer):
        if getattr(callback, "prediction_bar", None) is not None:
            callback.on_predict(trainer.args, trainer.state, trainer.control, metrics={})


def collected_metrics(trainer: Trainer) -> dict[str, list[float]] | None:
    """Return what TRL's trainers collect beside the evaluation loop, and log with it; None for other Trainers."""
    collected: Any = getattr(trainer, "_metrics", None)
    found = collected.get("eval") if isinstance(collected, dict) else None
    return found if isinstance(found, dict) else None
