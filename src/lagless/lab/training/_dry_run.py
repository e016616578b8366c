"""A rehearsal: everything once, nothing kept, and what the whole run would take."""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from lagless.averaging import Averager
from lagless.lab.recipes import Recipe
from lagless.lab.training._datasets import prepare
from lagless.lab.training._model import build_model
from lagless.lab.training._run import check_machine, memory_errors
from lagless.lab.training._trainer import build_trainer


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run measured; times are of a first step and a first evaluation, which are the slowest.

    Attributes:
        parameters: trainable ones.
        loss: of the step.
        steps: of the whole run; None where that needs all data to be tokenized.
        step_seconds: for one optimizer step.
        evaluation_seconds: for one evaluation of the live weights and of every average.
        evaluations: in the whole run.
        memory: peak, in bytes, of the accelerator or else of the process.
        disk: of the whole run's checkpoints and averages, in bytes.
    """

    parameters: int
    loss: float
    steps: int | None
    step_seconds: float
    evaluation_seconds: float
    evaluations: int | None
    memory: int
    disk: int | None

    def lines(self) -> list[str]:
        """The same in words."""
        found = [
            f"{self.parameters:,} trainable parameters, loss {self.loss:.4f}",
            f"one step {self.step_seconds:.2f} s, one evaluation {self.evaluation_seconds:.1f} s",
            f"peak memory {decimal(self.memory)}",
        ]
        if self.steps is None or self.evaluations is None or self.disk is None:
            return [*found, "the number of steps is known once all text is tokenized; set training.max_steps to fix it"]
        total = self.steps * self.step_seconds + self.evaluations * self.evaluation_seconds
        return [
            *found,
            f"the run: {self.steps:,} steps and {self.evaluations:,} evaluations, at most about {_duration(total)}, "
            f"{decimal(self.disk)} on disk",
        ]


def dry_run(recipe: Recipe, seed: int | None = None) -> Rehearsal:
    """Load everything, tokenize one batch, make one optimizer step and one evaluation; write nothing.

    Args:
        recipe: what to rehearse.
        seed: in place of the recipe's own.

    Raises:
        ValueError: if the recipe, the data or the machine do not fit.
        ImportError: if a package is missing that the recipe needs.
    """
    recipe = recipe.resolved(seed)
    check_machine(recipe)
    training, evaluation = recipe.training, recipe.evaluation
    once = recipe.model_copy(
        update={
            "training": training.model_copy(update={"max_steps": 1, "epochs": None, "log_every": 1}),
            "evaluation": evaluation.model_copy(update={"sequences": training.evaluation_batch_size, "every": 1}),
        }
    )
    prepared = prepare(once, few=training.batch_size)
    steps = training.max_steps
    if steps is None and prepared.available is not None:
        steps = math.ceil((training.epochs or 0) * prepared.available / training.batch_size)
    model = build_model(once, prepared.tokenizer)
    with tempfile.TemporaryDirectory() as folder, memory_errors(recipe):
        # Takes their memory, and finds rules that would have no update.
        averager = Averager(model, recipe.averages(), total_steps=steps) if recipe.method.averages else None
        without = once.model_copy(update={"method": once.method.model_copy(update={"averages": {}})})
        trainer = build_trainer(without, model, prepared, Path(folder))
        trainer.args.save_strategy = SaveStrategy.NO
        watch = _Stopwatch()
        trainer.add_callback(watch)
        trainer.train()
    del averager
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    models = 1 + len(recipe.method.averages)
    batches = math.ceil(evaluation.sequences / max(1, len(prepared.validation)))
    return Rehearsal(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        loss=next(log["loss"] for log in trainer.state.log_history if "loss" in log),
        steps=steps,
        step_seconds=watch.step,
        evaluation_seconds=watch.evaluation * batches * models,
        evaluations=steps and math.ceil(steps / evaluation.every),
        memory=_peak_memory(),
        # Checkpoints, θ_0, the averages, and one optimizer state of two moments.
        disk=steps and weights * (math.ceil(steps / training.save_every) + models + 2),
    )


class _Stopwatch(TrainerCallback):
    step = evaluation = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ended = time.perf_counter()
        self.step = self._ended - self._began

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.evaluation = time.perf_counter() - self._ended


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
