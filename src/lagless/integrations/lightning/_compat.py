"""What lagless uses of Lightning: under either of its names, and beyond its documented interface.

Names that Lightning does not document are used in this module alone. ``SEEN_IN`` are the releases in which all of them
were found to work; the test of this module names what is gone from another one.
"""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback as Callback, LightningModule as LightningModule
    from lightning.pytorch.loggers.logger import DummyLogger as DummyLogger
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn as rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng as isolate_rng
except ModuleNotFoundError:
    from pytorch_lightning import Callback as Callback, LightningModule as LightningModule
    from pytorch_lightning.loggers.logger import DummyLogger as DummyLogger
    from pytorch_lightning.utilities.rank_zero import rank_zero_warn as rank_zero_warn
    from pytorch_lightning.utilities.seed import isolate_rng as isolate_rng

Trainer = Any  # of either name; its callbacks and flags are attributes that only exist at run time

SEEN_IN = ("2.4", "2.5", "2.6")
"""Releases of Lightning in which all of the names below were found to work."""

LOOP_NAMES = ("_trainer_fn", "_stage", "inference_mode", "_data_source", "_combined_loader", "_max_batches", "_results")
"""Attributes of a validation loop; the first three are those of every loop like it."""

TRAINER_NAMES = ("fit_loop", "_logger_connector", "callback_metrics", "progress_bar_metrics", "logged_metrics")
"""Attributes of a Trainer."""

_DATA = ("_data_source", "_combined_loader", "_max_batches", "_last_val_dl_reload_epoch")


def validation_loop(trainer: Trainer) -> Any:
    """Return the loop that validates inside ``fit``."""
    return trainer.fit_loop.epoch_loop.val_loop


def set_validation_loop(trainer: Trainer, loop: Any) -> None:
    """Make ``loop`` the one that validates inside ``fit``."""
    trainer.fit_loop.epoch_loop.val_loop = loop


def second_loop(trainer: Trainer) -> Any:
    """Return another validation loop on the loaders of the first, whose metric objects are ready for one more pass."""
    first = validation_loop(trainer)
    again = type(first)(trainer, first._trainer_fn, first._stage, verbose=False, inference_mode=first.inference_mode)
    for name in _DATA:
        setattr(again, name, getattr(first, name))
    first._results.reset()  # metric objects in the module still hold the first pass, and it has read them
    return again


def metric_tables(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the tables in which callbacks, progress bars and loggers find metrics."""
    return [trainer.callback_metrics, trainer.progress_bar_metrics, trainer.logged_metrics]


def log_now(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Hand metrics to the loggers, with the step and epoch of the live ones."""
    trainer._logger_connector.log_metrics(metrics)
