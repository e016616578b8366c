"""One training run, from a recipe to a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from lagless.checkpoints import atomic_folder
from lagless.lab.environment import commit, machine, versions
from lagless.lab.recipes import Recipe
from lagless.lab.training._datasets import Prepared, prepare
from lagless.lab.training._folder import (
    METRICS,
    check_folder,
    claimed,
    last_checkpoint,
    read_result,
    write_result,
)
from lagless.lab.training._metrics import MetricsRecorder
from lagless.lab.training._model import build_model
from lagless.lab.training._trainer import accumulation, build_trainer


def train(
    recipe: Recipe, out: str | Path, seed: int | None = None, notify: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train by a recipe, or finish what was begun.

    The folder holds ``recipe.yaml``, ``checkpoint-N`` (0 is θ_0), ``averaged/NAME`` for every average,
    ``metrics.jsonl`` and, once finished, ``result.json``. A run that was interrupted goes on from its latest complete
    checkpoint; a finished one is not computed again.

    Args:
        recipe: what to do.
        out: the folder of the run.
        seed: in place of the recipe's own.
        notify: called with a line of text now and then.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError: if the recipe, the data, the machine or the folder do not fit; before training where possible.
        ImportError: if a package is missing that the recipe needs.
    """
    recipe, out = recipe.resolved(seed), Path(out).expanduser()
    check_machine(recipe)
    check_folder(out, recipe)
    if (result := read_result(out)) is not None:
        return result
    state = PartialState(cpu=not torch.accelerator.is_available())
    with claimed(out, recipe) if state.is_main_process else nullcontext():
        with state.main_process_first():  # the others find the data in the cache
            prepared = prepare(recipe)
        model = build_model(recipe, prepared.tokenizer)
        checkpoint = last_checkpoint(out, averages=bool(recipe.method.averages))
        if checkpoint is None and state.is_main_process:
            _save_start(model, prepared, out / "checkpoint-0")
        trainer = build_trainer(recipe, model, prepared, out)
        recorder = MetricsRecorder(
            out / METRICS,
            step=0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-")),
            averages=recipe.method.averages,
            own="optimizer" if recipe.method.optimizer.keeps_average else "live",
            notify=notify,
        )
        trainer.add_callback(recorder)
        with memory_errors(recipe):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.export_average(out / "averaged" / "optimizer")
        if not state.is_main_process:
            return {}
        measured = {"final": recorder.final, "seconds": round(recorder.seconds, 3)}
        record = {"machine": machine(), "versions": versions(), "commit": commit()}
        return write_result(out, recipe, measured | record)


def check_machine(recipe: Recipe) -> None:
    """Refuse what this machine cannot do.

    Raises:
        ValueError: if an accelerator is needed and there is none, or the batch does not divide among the processes.
    """
    if not torch.accelerator.is_available():
        if recipe.needs_accelerator:
            raise ValueError(
                f"recipe {recipe.name} needs an accelerator, and torch {torch.__version__} finds none. Run it where "
                "there is one, choose a recipe whose name ends in small, or insist with --set needs_accelerator=false."
            )
        if recipe.training.precision == "float16":
            raise ValueError("training.precision=float16 needs an accelerator. Choose float32 or bfloat16.")
    accumulation(recipe)


@contextmanager
def memory_errors(recipe: Recipe) -> Iterator[None]:
    """Say what to change when memory runs out.

    Raises:
        ValueError: in place of the error of the accelerator or of the machine.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        training, steps = recipe.training, accumulation(recipe)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"out of memory with training.micro_batch_size={training.micro_batch_size} and "
            f"training.evaluation_batch_size={training.evaluation_batch_size} ({reason}). Halve micro_batch_size: "
            f"gradient accumulation goes from {steps} to {2 * steps} microbatches and batch_size="
            f"{training.batch_size} stays. Or set training.gradient_checkpointing=true, or shorten the sequences."
        ) from error


def _save_start(model: PreTrainedModel, prepared: Prepared, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        prepared.tokenizer.save_pretrained(temporary)
