"""Metrics of a run, as they come: one line of JSON each."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lagless.lab.output import write_text

_TRAINING = ("loss", "grad_norm", "learning_rate")


class MetricsRecorder(TrainerCallback):
    """Writes what the Trainer logs and evaluates to ``metrics.jsonl``.

    A line is ``{"step", "weights", "split", "metric", "value"}``; a value that is not finite is null.

    Args:
        path: of the file; what a former part of the run wrote in it stays up to ``step``.
        step: the step that the run starts at.
        averages: names of the averages that are evaluated.
        own: what the weights are called that the Trainer evaluates as the model's.
        notify: called with a line of text for people.

    Attributes:
        final: weights → metric → value of the latest evaluation.
    """

    def __init__(
        self, path: Path, *, step: int, averages: Collection[str], own: str, notify: Callable[[str], None]
    ) -> None:
        self._path, self._averages, self._own, self._notify = path, averages, own, notify
        self._step, self._started = step, time.monotonic()
        self.final: dict[str, dict[str, float | None]] = {}

    @property
    def seconds(self) -> float:
        """Time since the start of the run, without the pauses between its parts."""
        return time.monotonic() - self._started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from what a former part of the run measured up to its checkpoint; drop the rest."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        kept = [record for record in map(json.loads, lines) if record["step"] <= self._step]
        spent = max((r["value"] for r in kept if r["metric"] == "seconds"), default=0.0)
        losses = [record for record in kept if (record["split"], record["metric"]) == ("valid", "loss")]
        self.final = {r["weights"]: {"loss": r["value"]} for r in losses if r["step"] == losses[-1]["step"]}
        self._started = time.monotonic() - spent
        if state.is_world_process_zero:
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the training loss."""
        logs = kwargs["logs"]
        found = {metric: logs[metric] for metric in _TRAINING if metric in logs}
        self._write(state, "live", "train", found)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the held-out losses."""
        metrics = kwargs["metrics"]
        losses = {self._own: metrics["eval_loss"]}
        losses |= {name: metrics[key] for name in self._averages if (key := f"eval_{name}_loss") in metrics}
        self.final = {name: {"loss": _finite(loss)} for name, loss in losses.items()}
        for name, loss in losses.items():
            self._write(state, name, "valid", {"loss": loss})
        self._write(state, self._own, "valid", {"seconds": self.seconds})
        if state.is_world_process_zero:
            listed = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            self._notify(f"step {state.global_step} of {state.max_steps}: held-out loss {listed}")

    def _write(self, state: TrainerState, weights: str, split: str, values: dict[str, float]) -> None:
        if not state.is_world_process_zero:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for metric, value in values.items():
                record = {"step": state.global_step, "weights": weights, "split": split, "metric": metric}
                file.write(json.dumps(record | {"value": _finite(value)}) + "\n")


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
