"""Evaluation in memory: one model, filled with one average after another."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lagless.checkpoints import CheckpointError
from lagless.lab.evaluate import load_tokenizer
from lagless.lab.evaluation import ClosedLoop, Sequences, held_out_sequences, hf_model, sequence_losses
from lagless.watch._measured import Measured
from lagless.watch._plans import EvaluationError, HeldOutPlan
from lagless.watch._snapshot import Snapshot


class HeldOutEvaluation:
    """The library's held-out loss and tasks. The model stays in memory from one evaluation to the next, alone.

    Args:
        plan: what to measure.
        companions: the folder with configuration and tokenizer; it is there when the first average is.
    """

    in_memory = True

    def __init__(self, plan: HeldOutPlan, companions: Path) -> None:
        self._plan, self._companions = plan, companions
        self._model: Any = None
        self._tokenizer: Any = None
        self._sequences: Sequences | None = None
        self._tasks: ClosedLoop | None = None

    def __call__(self, snapshot: Snapshot, name: str, folder: Path | None = None, /) -> Measured:
        """Evaluate the average of a rule, or with ``"live"`` the checkpoint.

        Raises:
            EvaluationError: if model, tokenizer or data cannot be used.
        """
        try:
            return self._evaluate(snapshot, name)
        except (CheckpointError, OSError, ValueError, ImportError, RuntimeError) as error:
            raise EvaluationError(" ".join(str(error).split())[:500]) from error

    def _evaluate(self, snapshot: Snapshot, name: str) -> Measured:
        self._prepare(snapshot)
        fill(self._model, self._named(snapshot.state(name)))
        loss = None if self._sequences is None else self._loss()
        if self._tasks is None:
            assert loss is not None
            return loss
        scores = self._tasks(hf_model(self._model, self._tokenizer, self._plan.batch_size))
        accuracies = {f"{task}/accuracy": score.mean.value for task, score in scores.items()}
        if loss is not None:
            return Measured(loss.loss, loss.standard_error, loss.n, accuracies, loss.items)
        right = np.array([value for score in scores.values() for value in score.prompts.values()])
        wrong = 1.0 - right
        error = float(wrong.std(ddof=1)) / np.sqrt(len(wrong)) if len(wrong) > 1 else None
        return Measured(float(wrong.mean()), error, len(wrong), accuracies, (wrong, np.ones(len(wrong))))

    def _loss(self) -> Measured:
        assert self._sequences is not None
        losses = sequence_losses(self._model, self._sequences, self._plan.batch_size)
        mean = losses.mean
        items = losses.nats.double().numpy(), losses.targets.double().numpy()
        return Measured(mean.value, mean.standard_error, mean.n, {}, items)

    def _prepare(self, snapshot: Snapshot) -> None:
        if self._model is not None:
            return
        self._tokenizer = load_tokenizer(self._companions)
        plan = self._plan
        if plan.data is not None:
            found = held_out_sequences(plan.data, self._tokenizer, length=plan.length, count=None, seed=plan.seed)
            count = min(plan.sequences, len(found.tokens))
            chosen = sorted(random.Random(plan.seed).sample(range(len(found.tokens)), count))
            self._sequences = Sequences(found.tokens[chosen], found.labels[chosen])
        if plan.tasks:
            self._tasks = ClosedLoop(
                plan.tasks, dict(plan.task_data), prompts=plan.prompts, samples=plan.samples, seed=plan.seed
            )
        self._model = _empty_model(self._companions, snapshot.record.is_adapter, getattr(torch, plan.dtype))
        self._model.eval().to(torch.device(plan.device or torch.accelerator.current_accelerator() or "cpu"))

    def _named(self, state: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Tensors under the names that the model has for them: peft puts the adapter's own into its names."""
        own = self._model.state_dict().keys() if _is_peft(self._model) else ()
        for name, tensor in state:
            stem, _, last = name.rpartition(".")
            inner = f"{stem}.default.{last}"
            yield (inner if inner in own else name), tensor


def fill(model: Any, state: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors into a model one by one, so that no second copy of all of them is held.

    Raises:
        CheckpointError: if the model has a tensor that is not among them, or the other way round.
    """
    own = model.state_dict()
    given: set[str] = set()
    with torch.no_grad():
        for name, tensor in state:
            if name not in own or own[name].shape != tensor.shape:
                raise CheckpointError(
                    f"the checkpoints do not fit the model: {name!r} {list(tensor.shape)} is not in it. Evaluate with "
                    "--eval-command, which gets the model as a folder."
                )
            own[name].copy_(tensor)
            given.add(name)
    if _is_peft(model):
        return
    places = {own[name].data_ptr() for name in given}
    if missing := [name for name in own if name not in given and own[name].data_ptr() not in places]:
        raise CheckpointError(
            f"the checkpoints do not fit the model: they lack {missing[0]!r}. Evaluate with --eval-command, which gets "
            "the model as a folder."
        )


def _empty_model(companions: Path, is_adapter: bool, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not is_adapter:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(companions), dtype=dtype)
    from peft import PeftConfig, PeftModel

    config: Any = PeftConfig.from_pretrained(str(companions))
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=dtype)
    return PeftModel(base, config)


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config")
