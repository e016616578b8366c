"""One more pass of Lightning's validation, of whatever weights are in the model, under metric names of its own.

Lightning has no call for this: ``Trainer.validate`` cannot run inside ``fit``, and a loop written by hand would miss
the reductions, synchronisation and metric objects behind ``self.log``. So a second loop of Lightning's own kind runs on
the loaders of the first. It may, once the first has read all its batches and its metrics are out: that is, in
``on_validation_end``. The loop's state (progress, results, which modules were in train mode) is its own; metrics,
callbacks, loggers and random number generators are put back.
"""

from __future__ import annotations

from collections import ChainMap
from typing import Any

from lagless.integrations.lightning._imports import DummyLogger, Trainer, isolate_rng

_DATA = ("_data_source", "_combined_loader", "_max_batches", "_last_val_dl_reload_epoch")


def validate_again(trainer: Trainer, prefix: str) -> None:
    """Validate the model as it is now; each metric ``m`` of it becomes the trainer's metric ``{prefix}{m}``.

    The module's hooks run as in every validation. Callbacks other than the progress bar do not see it, and loggers get
    the prefixed metrics alone.

    Args:
        trainer: at the end of a validation inside ``fit``.
        prefix: of the names.
    """
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    first = epoch_loop.val_loop
    again = type(first)(trainer, first._trainer_fn, first._stage, verbose=False, inference_mode=first.inference_mode)
    for name in _DATA:
        setattr(again, name, getattr(first, name))
    first._results.reset()  # metric objects in the module still hold the first pass, and it has read them

    tables = [trainer.callback_metrics, trainer.progress_bar_metrics, trainer.logged_metrics]
    before = [dict(table) for table in tables]
    callbacks, loggers = trainer.callbacks, trainer.loggers
    for table in tables:
        table.clear()
    epoch_loop.val_loop = again
    trainer.callbacks = [trainer.progress_bar_callback] if trainer.progress_bar_callback else []
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        with isolate_rng():
            logged = dict(ChainMap(*again.run()))
        for metrics, table in zip(before, tables, strict=True):
            metrics |= _prefixed(table, prefix)
    finally:
        epoch_loop.val_loop, trainer.callbacks, trainer.loggers = first, callbacks, loggers
        for metrics, table in zip(before, tables, strict=True):
            table.clear()
            table.update(metrics)
    trainer._logger_connector.log_metrics(_prefixed(logged, prefix))  # with the step and epoch of the live metrics


def _prefixed(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in metrics.items()}
