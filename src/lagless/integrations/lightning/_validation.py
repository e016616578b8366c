"""One more pass of Lightning's validation, of whatever weights are in the model, under metric names of its own.

Lightning has no call for this: ``Trainer.validate`` cannot run inside ``fit``, and a loop written by hand would miss
the reductions, synchronisation and metric objects behind ``self.log``. So a second loop of Lightning's own kind runs on
the loaders of the first. It may, once the first has read all its batches and its metrics are out: that is, in
``on_validation_end``. The loop's state (progress, results, which modules were in train mode) is its own; metrics,
callbacks, loggers and random number generators are put back.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch

from lagless.integrations.lightning._compat import (
    DummyLogger,
    Trainer,
    isolate_rng,
    log_now,
    metric_tables,
    second_loop,
    set_validation_loop,
    validation_loop,
)


def validate_again(trainer: Trainer, prefix: str, facts: Mapping[str, float] | None = None) -> None:
    """Validate the model as it is now; each metric ``m`` of it becomes the trainer's metric ``{prefix}{m}``.

    The module's hooks run as in every validation. Callbacks other than the progress bar do not see it, and loggers get
    the prefixed metrics alone.

    Args:
        trainer: at the end of a validation inside ``fit``.
        prefix: of the names.
        facts: numbers about the average to log with its metrics.
    """
    first, again = validation_loop(trainer), second_loop(trainer)
    tables = metric_tables(trainer)
    before = [dict(table) for table in tables]
    callbacks, loggers = trainer.callbacks, trainer.loggers
    for table in tables:
        table.clear()
    set_validation_loop(trainer, again)
    trainer.callbacks = [trainer.progress_bar_callback] if trainer.progress_bar_callback else []
    trainer.loggers = [DummyLogger() for _ in loggers]
    known = {name: torch.tensor(value, dtype=torch.float32) for name, value in (facts or {}).items()}
    try:
        with isolate_rng():
            logged = dict(ChainMap(*again.run())) | known
        for metrics, table in zip(before, tables, strict=True):
            metrics |= _prefixed(table, prefix)
        for metrics in (before[0], before[2]):  # not the progress bar
            metrics |= _prefixed(known, prefix)
    finally:
        set_validation_loop(trainer, first)
        trainer.callbacks, trainer.loggers = callbacks, loggers
        for metrics, table in zip(before, tables, strict=True):
            table.clear()
            table.update(metrics)
    log_now(trainer, _prefixed(logged, prefix))


def _prefixed(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in metrics.items()}
