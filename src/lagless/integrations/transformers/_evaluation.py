"""The Trainer's own evaluation, of averages, without a trace in the training run."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import speed_metrics

from lagless.averaging import Averager
from lagless.integrations._facts import AverageMoments, distance
from lagless.integrations.transformers._compat import close_progress_bar, collected_metrics


def evaluate_averages(
    trainer: Trainer,
    model: nn.Module,
    averager: Averager,
    names: Iterable[str],
    eval_dataset: Any,
    ignore_keys: list[str] | None,
    metric_key_prefix: str,
    moments: Mapping[str, AverageMoments] | None = None,
) -> dict[str, float]:
    """Do for averages what ``Trainer.evaluate`` has just done for the live model, and log it.

    ``Trainer.evaluate`` itself would raise ``on_evaluate`` again, and callbacks that count evaluations, such as early
    stopping, would count each average as one more.

    Args:
        trainer: between two steps, or before or after training.
        model: the Trainer's.
        averager: the averages of it.
        names: which of them; each has had an update.
        eval_dataset: as ``Trainer.evaluate`` takes it.
        ignore_keys: likewise.
        metric_key_prefix: of the live model's metrics.
        moments: of each average, whose mean age and effective number of iterates are logged too.

    Returns:
        The metrics; those of the average ``name`` begin with ``{metric_key_prefix}_{name}_``.
    """
    merged: dict[str, float] = {}
    for name in names:
        prefix = f"{metric_key_prefix}_{name}"
        began = time.time()
        close_progress_bar(trainer)  # the callback that draws it counts on from the evaluation before
        with same_random_state(model), averager.applied(name):
            # A new one, as in evaluate(): an iterator with a state of its own would give the average other batches.
            batches = trainer.get_eval_dataloader(eval_dataset)
            output = trainer.evaluation_loop(
                batches,
                description=f"Evaluation of {name}",
                prediction_loss_only=True if trainer.compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=prefix,
            )
        metrics = output.metrics or {}
        metrics |= {f"{prefix}_{key}": value for key, value in _take_metrics_aside(trainer).items()}
        metrics |= {f"{prefix}_{key}": value for key, value in facts_of(averager, name, model, moments).items()}
        count = output.num_samples or 0
        size = trainer.args.eval_batch_size * trainer.args.world_size
        metrics |= speed_metrics(prefix, began, num_samples=count, num_steps=math.ceil(count / size))
        merged |= metrics | log_average(trainer, metrics, prefix, metric_key_prefix)
    close_progress_bar(trainer)
    return merged


def facts_of(
    averager: Averager, name: str, model: nn.Module, moments: Mapping[str, AverageMoments] | None
) -> dict[str, float]:
    """Return what is logged of an average beside its losses; the model holds the live weights."""
    found = {"distance": distance(averager, name, model), "updates": float(averager.updates(name))}
    if moments is not None and (known := moments[name].at(averager.step)) is not None:
        found |= {"mean_age": known[0], "effective_iterates": known[1]}
    return found


def average_of(
    metric: str, names: Iterable[str], eval_dataset: Any, history: Iterable[Mapping[str, Any]] = ()
) -> str | None:
    """The average whose metric ``metric`` is, or None: the live model's.

    Args:
        metric: as in ``metric_for_best_model``; ``eval_`` may be left out.
        names: the averages.
        eval_dataset: the Trainer's; a dictionary's keys are part of the metrics' names.
        history: what was logged; a metric beside the live model's is its own, whatever it is called.

    >>> average_of("eval_bema_loss", ["bema", "ema"], None), average_of("loss", ["bema", "ema"], None)
    ('bema', None)
    >>> average_of("code_ema_accuracy", ["bema", "ema"], {"code": ..., "text": ...})
    'ema'
    >>> average_of("mean_length", ["mean"], None, [{"eval_runtime": 0.1, "eval_mean_length": 7.0}])
    """
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    sets = [f"eval_{dataset}" for dataset in eval_dataset] if isinstance(eval_dataset, dict) else ["eval"]
    if any(key in entry and any(f"{dataset}_runtime" in entry for dataset in sets) for entry in history):
        return None
    prefixes = {f"{dataset}_{name}_": name for dataset in sets for name in names}
    matching = [prefix for prefix in prefixes if key.startswith(prefix)]
    return prefixes[max(matching, key=len)] if matching else None


@contextmanager
def same_random_state(model: nn.Module) -> Iterator[None]:
    """Python's, numpy's and torch's generators after the block as before it; a data loader draws even in order."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    device_type = next(iter(devices)).type if devices else "cuda"
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device.index for device in devices], device_type=device_type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _take_metrics_aside(trainer: Trainer) -> dict[str, float]:
    """Means of what TRL's trainers collect beside the loop, and would log next as the live model's."""
    collected = collected_metrics(trainer)
    if collected is None:
        return {}
    lists = {key: [value for value in values if not math.isnan(value)] for key, values in collected.items()}
    collected.clear()
    return {key: sum(values) / len(values) for key, values in lists.items() if values}


_NOT_METRICS = ("epoch", "step", "num_input_tokens_seen")
"""What Trainer.log adds to every entry."""


def log_average(trainer: Trainer, metrics: Mapping[str, float], prefix: str, live_prefix: str) -> dict[str, float]:
    """Log an average's metrics, and give the average's prefix to whatever else the trainer puts into the entry.

    Trainers that collect metrics beside the loop add them in ``log``, under the live model's names.

    Returns:
        What the trainer added, under the names that it got.
    """
    handler, history, before = trainer.callback_handler, trainer.state.log_history, len(trainer.state.log_history)
    on_log, added = handler.on_log, {}

    def rename(entry: dict[str, Any]) -> None:
        for key in [key for key in entry if key not in _NOT_METRICS and not key.startswith(f"{prefix}_")]:
            own = f"{prefix}_{key.removeprefix(f'{live_prefix}_')}"
            value = entry.pop(key)
            if own not in entry:
                entry[own] = added[own] = value

    def renamed(args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> Any:
        rename(logs)
        return on_log(args, state, control, logs, **kwargs)

    handler.on_log = renamed  # all callbacks hear of it here, whichever comes first
    try:
        trainer.log(dict(metrics))
    finally:
        del handler.on_log
    for entry in history[before:]:
        rename(entry)
    return added


def losses_of(trainer: Trainer, name: str) -> dict[str, Any]:
    """Return the last evaluation losses of the live model and of an average, and their step, as part of a record."""
    found: dict[str, Any] = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if key.startswith("eval_") and key.endswith("_loss") and isinstance(value, (int, float)):
                if key == "eval_loss" or f"_{name}_loss" in key:
                    found |= {key: float(value), "step": entry.get("step")}
    return {"losses": found} if found else {}
