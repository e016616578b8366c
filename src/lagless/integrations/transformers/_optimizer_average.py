"""The average that the Trainer's optimizer keeps: evaluated, stored with the best step, and the model that is returned.

The Trainer switches such an optimizer to evaluation before it evaluates, and back before it trains. So it evaluates the
average; what it saves is the average too, or not, as the two happened to follow each other. Here checkpoints always
hold the live weights, and the model that the Trainer ends with is always the average.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.utils import logging

from lagless.averaging import plain_name, unwrap
from lagless.checkpoints import CheckpointError
from lagless.execution import is_sharded
from lagless.integrations._exports import base_model_name, describe, export_folder, remove_export
from lagless.integrations.distributed import export_model
from lagless.integrations.transformers._compat import best_step, save_quietly
from lagless.integrations.transformers._evaluation import losses_of
from lagless.integrations.transformers._lora import is_adapter
from lagless.integrations.transformers._returned_model import record_saves
from lagless.optim import AveragedOptimizer
from lagless.rules import count_updates

FILE = "optimizer_average.safetensors"

logger = logging.get_logger(__name__)

_OF_THE_RUN = ("runtime", "samples_per_second", "steps_per_second")


class OptimizerAverage:
    """The average in the state of the Trainer's optimizer, under the names of the Trainer's model."""

    def __init__(self, optimizer: AveragedOptimizer, model: nn.Module) -> None:
        self.optimizer = optimizer
        self._model = unwrap(model)
        self.sharded = any(is_sharded(p) for p in self._model.parameters())

    @property
    def name(self) -> str:
        """Return the name of the average."""
        return self.optimizer.average_name

    def metrics(self, metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
        """Return the metrics of an evaluation of the average, which the Trainer took for those of its model."""
        if not self.optimizer.updates():
            return {}
        own = {key.removeprefix(f"{prefix}_"): value for key, value in metrics.items() if key.startswith(f"{prefix}_")}
        return {f"{prefix}_{self.name}_{key}": value for key, value in own.items() if key not in _OF_THE_RUN}

    def check(self, args: TrainingArguments, best: Path | None, state: TrainerState) -> None:
        """Refuse a return to the best step that would lose the average.

        Raises:
            NotImplementedError: if parameters are sharded.
            ValueError: if the average was not saved with ``best``, the best checkpoint so far.
        """
        if not args.load_best_model_at_end:
            return
        if self.sharded:
            raise NotImplementedError(
                f"load_best_model_at_end does not go back to the average of {self.name} where parameters are sharded; "
                "leave the option out, and the model is the average of the last step."
            )
        if best is not None and self._updates(best_step(state) or 0) and not (best / FILE).is_file():
            raise ValueError(
                f"load_best_model_at_end may go back to {best}, where there is no {FILE}: it was saved without the "
                "callback. Go on without load_best_model_at_end."
            )

    def save(self, checkpoint: Path) -> None:
        """Write the average, in the parameters' dtype, into a checkpoint; nothing before its first update."""
        if self.optimizer.updates():
            tensors = {key: value.cpu().contiguous() for key, value in self._averages().items()}
            partial = checkpoint / f".{FILE}.partial"
            save_file(tensors, partial)
            partial.replace(checkpoint / FILE)

    def become_model(self, trainer: Trainer, best: Path | None, out: Path) -> None:
        """Make the average the Trainer's model, and export it.

        Args:
            trainer: at the end of training.
            best: the checkpoint to whose live weights the Trainer has gone back.
            out: the folder.
        """
        step = self.optimizer.steps_taken if best is None else best_step(trainer.state) or 0
        if not self._updates(step):
            logger.warning(f"{self.name} has had no update at step {step}: the model holds the live weights.")
            self.show()
            if trainer.args.should_save:
                remove_export(out)
            return
        self._hold(None if best is None else best / FILE)
        record = describe(self.optimizer, self.name) | {"step": step, "updates": self._updates(step)}
        if self.sharded and not is_adapter(trainer):
            model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
            export_model(self.optimizer, model, out, tokenizer=tokenizer, overwrite=True)
        elif trainer.args.should_save:
            base = base_model_name(trainer.accelerator.unwrap_model(trainer.model))
            with export_folder(out, record | losses_of(trainer, self.name), base) as temporary:
                save_quietly(trainer, temporary)
        else:
            save_quietly(trainer, out)  # takes part, writes nothing
        record_saves(trainer, record)

    def keep(self) -> None:
        """Take what the parameters hold for the live weights."""
        held = self._held()
        self.optimizer.train()
        self._copy(held)

    def show(self) -> None:
        """Take what the parameters hold for what the optimizer shows until training goes on."""
        held = self._held()
        self.optimizer.eval()
        self._copy(held)

    def _updates(self, step: int) -> int:
        return max(count_updates(group["average"], step) for group in self.optimizer.param_groups)

    def _hold(self, path: Path | None) -> None:
        """Put the average into the model until training goes on: that of ``path``, or else the present one."""
        self.optimizer.eval()
        if path is not None:
            self._put(path)

    def _averages(self) -> dict[str, Tensor]:
        averages = self.optimizer.named_averages(module=self._model)
        return {plain_name(key): value.to(self._model.get_parameter(key).dtype) for key, value in averages}

    def _put(self, path: Path) -> None:
        stored = load_file(path)
        own = {plain_name(name): p for name, p in self._model.named_parameters()}
        if unknown := sorted(stored.keys() - own.keys()):
            raise CheckpointError(f"{path}: holds the average of {unknown[0]}, which the model does not have.")
        with torch.no_grad():
            for name, value in stored.items():
                own[name].copy_(value)

    def _held(self) -> list[tuple[Tensor, Tensor]]:
        return [(p, p.detach().clone()) for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def _copy(self, held: list[tuple[Tensor, Tensor]]) -> None:
        for parameter, value in held:
            parameter.copy_(value)
