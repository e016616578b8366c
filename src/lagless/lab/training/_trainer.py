"""The trainers: TRL's for conversations, that of transformers for text, with the optimizer and schedule of a recipe."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from lagless.checkpoints import atomic_folder
from lagless.integrations.transformers import AveragingCallback
from lagless.lab.recipes import Recipe, SftData
from lagless.lab.training._datasets import Prepared
from lagless.lab.training._optimizer import build_optimizer, schedule_factor

_NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"


def build_trainer(recipe: Recipe, model: PreTrainedModel, prepared: Prepared, out: Path) -> RecipeTrainer:
    """A trainer that follows the recipe's averages and keeps its checkpoints in ``out``.

    Raises:
        ValueError: if the batch does not divide among the processes.
    """
    arguments = _arguments(recipe, out)
    shared: dict[str, Any] = {
        "model": model,
        "processing_class": prepared.tokenizer,
        "train_dataset": prepared.train,
        "eval_dataset": prepared.validation,
        "callbacks": [AveragingCallback(recipe.averages())] if recipe.method.averages else [],
    }
    data = recipe.data
    if isinstance(data, SftData):
        config = SFTConfig(
            **arguments,
            max_length=data.max_length,
            packing=data.packing,
            assistant_only_loss=data.loss_on == "assistant",
            dataset_num_proc=data.processes if data.processes > 1 and len(prepared.train) > 10_000 else None,
        )
        trainer: RecipeTrainer = _SftTrainer(args=config, **shared)
    else:
        trainer = _PretrainingTrainer(args=TrainingArguments(**arguments), data_collator=_collate, **shared)
    trainer.recipe = recipe
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_OptimizerStates())  # after the averages are saved
    return trainer


def accumulation(recipe: Recipe) -> int:
    """Microbatches in an optimizer step of one process.

    Raises:
        ValueError: if that is no whole number.
    """
    training, processes = recipe.training, int(os.environ.get("WORLD_SIZE", "1"))
    steps, rest = divmod(training.batch_size, training.micro_batch_size * processes)
    if rest or not steps:
        raise ValueError(
            f"training.batch_size={training.batch_size} is no multiple of training.micro_batch_size="
            f"{training.micro_batch_size} times {processes} process{'es' if processes > 1 else ''}. Change one of them."
        )
    return steps


def _arguments(recipe: Recipe, out: Path) -> dict[str, Any]:
    training = recipe.training
    accelerated = torch.accelerator.is_available()
    length = {"max_steps": training.max_steps} if training.max_steps else {"num_train_epochs": training.epochs}
    return {
        "output_dir": str(out),
        "seed": recipe.seed,
        **length,
        "per_device_train_batch_size": training.micro_batch_size,
        "per_device_eval_batch_size": training.evaluation_batch_size,
        "gradient_accumulation_steps": accumulation(recipe),
        "learning_rate": training.learning_rate,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.precision == "bfloat16",
        "fp16": training.precision == "float16",
        _CHECKPOINTING: training.gradient_checkpointing,
        "logging_steps": training.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": recipe.evaluation.every,
        "save_strategy": "steps",
        "save_steps": training.save_every,
        "use_cpu": not accelerated,
        "dataloader_pin_memory": accelerated,
        "disable_tqdm": not sys.stderr.isatty(),
        "ddp_find_unused_parameters": False,
        "report_to": "none",
    }


class RecipeTrainer(Trainer):
    """A Trainer with the optimizer and the schedule of a recipe. Its checkpoints hold the live weights.

    Attributes:
        recipe: what it follows.
    """

    recipe: Recipe

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """The recipe's optimizer."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.recipe, model or self.model)  # pyright: ignore
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """The recipe's schedule."""
        if self.lr_scheduler is None:
            factor = schedule_factor(self.recipe.method.schedule, num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from the checkpoint of the last step, the Trainer would make one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.hold_average(False)  # evaluation has put an optimizer's own average into the model
        super()._save_checkpoint(model, trial)

    def hold_average(self, average: bool) -> bool:
        """Put the average that the optimizer keeps into the model, or the live weights; whether it keeps one."""
        # Accelerate's own class has these methods in any case.
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if not hasattr(inner, "eval"):
            return False
        inner.eval() if average else inner.train()
        return True

    def export_average(self, folder: Path) -> None:
        """Write the model with the optimizer's own average, if it keeps one."""
        if not self.hold_average(True):
            return
        try:
            if self.args.should_save:
                with atomic_folder(folder) as temporary:
                    self.save_model(str(temporary), _internal_call=True)
            else:
                self.save_model(str(folder), _internal_call=True)  # takes part, writes nothing
        finally:
            self.hold_average(False)


class _PretrainingTrainer(RecipeTrainer):
    pass


class _SftTrainer(RecipeTrainer, SFTTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        # Sophia samples labels from the logits, which TRL's own loss never forms.
        if self.recipe.method.optimizer.kind == "sophia":
            return Trainer.compute_loss(self, *args, **kwargs)
        return super().compute_loss(*args, **kwargs)


def _collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    tokens = torch.tensor([feature["input_ids"] for feature in features], dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens.clone()}


class _OptimizerStates(TrainerCallback):
    """Keeps the optimizer's state in the latest checkpoint only: twice the weights, and no average needs it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not args.should_save:
            return
        for path in Path(args.output_dir or ".").glob("checkpoint-*/optimizer*"):
            if path.parent.name != f"checkpoint-{state.global_step}":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
