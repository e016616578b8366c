"""The callback for transformers.Trainer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from lagless.averaging import Attachment, Averager
from lagless.checkpoints import check_destination
from lagless.integrations._exports import export_folder, remove_export
from lagless.integrations.distributed import export_model
from lagless.integrations.transformers._caller import calling_trainer
from lagless.integrations.transformers._evaluation import average_of, evaluate_averages
from lagless.integrations.transformers._lora import MergedLoraAverager
from lagless.rules import Rule, count_updates

STATE_FILE = "averages.safetensors"
FOLDER = "averaged"

logger = logging.get_logger(__name__)


class AveragingCallback(TrainerCallback):
    """Averages in a ``transformers.Trainer`` or any trainer derived from it: followed, evaluated, saved, exported.

    - **Steps.** An update counts optimizer steps: one per accumulated batch, none where a gradient scaler skipped.
    - **Evaluation.** Whatever the Trainer evaluates is evaluated with each average too. The metrics of the average
      ``name`` are called ``eval_{name}_loss`` and so on (``eval_{dataset}_{name}_loss`` with a dictionary of datasets),
      and ``metric_for_best_model``, early stopping and learning-rate schedules may follow them. The training run stays
      bitwise what it would have been.
    - **Checkpoints.** Each ``checkpoint-N`` gets ``averages.safetensors``; a resumed run continues bit for bit.
      Under ``save_only_model`` it is left out, like the optimizer's state, unless ``load_best_model_at_end`` needs it.
    - **The end.** ``output_dir/averaged/{name}`` is the average as a model, or adapter, ready to load. With
      ``load_best_model_at_end`` the averages go back to the best step along with the live weights, and if
      ``metric_for_best_model`` is an average's, that average is the model which the Trainer then holds.

    Args:
        rules: one rule, or a mapping of names to rules. A single rule is named by its class in lower case. None for
            ``EMA(half_life_fraction=0.05)``, the same average at every length of run.
        evaluate: the averages to evaluate, by name; None for all.
        export_at_save: write ``checkpoint-N/averaged/{name}`` at each save as well.
        on_missing_state: what to do when the checkpoint to resume from has no averages: ``"refuse"``, or ``"restart"``
            them at that step.
        merged_lora: for a PEFT model, average the update BA of each LoRA layer instead of A and B, and take its nearest
            adapter of the same rank. Costs a float32 copy of the adapted layers' weights per buffer.
        options: of the :class:`lagless.Averager`: ``dtype``, ``device``, ``start``, ``seed``, ``compile``.

    Attributes:
        averager: the Averager of the present or latest run; None before, and once the model itself is an average.

    Raises:
        ValueError: at the start of training, if a rule would have no update in it or anything else does not fit.
        RuntimeError: at the end of training, if it stopped before a rule's first update.

    >>> from lagless import EMA
    >>> callback = AveragingCallback(EMA(half_life_fraction=0.05))
    >>> # Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        rules: Rule | Mapping[str, Rule] | None = None,
        *,
        evaluate: str | Collection[str] | None = None,
        export_at_save: bool = False,
        on_missing_state: Literal["refuse", "restart"] = "refuse",
        merged_lora: bool = False,
        **options: Any,
    ) -> None:
        if on_missing_state not in ("refuse", "restart"):
            raise ValueError(f"on_missing_state={on_missing_state!r}; it must be 'refuse' or 'restart'.")
        self.averager: Averager | None = None
        self._rules, self._options = rules, options
        self._kind = MergedLoraAverager if merged_lora else Averager
        self._evaluate = [evaluate] if isinstance(evaluate, str) else evaluate
        self._export_at_save = export_at_save
        self._on_missing_state = on_missing_state
        self._attachment: Attachment | None = None
        self._saved_step: int | None = None
        # An error in the Trainer's last event keeps it from the callbacks that come later.
        self._last = TrainerCallback()
        self._last.on_train_end = self._end

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the Averager, or restore it, and follow the optimizer."""
        trainer, [checkpoint] = calling_trainer(self, "resume_from_checkpoint")
        self._refuse(trainer)
        if self._attachment is not None:  # of a run that ended in an error, such as one batch size too many
            self._attachment.remove()
        stored = None if checkpoint is None else Path(checkpoint, STATE_FILE)
        joins = stored is not None and not stored.is_file()
        if joins and self._on_missing_state == "refuse":
            raise ValueError(
                f"{stored} is missing: this checkpoint was saved without the callback, or with save_only_model, or the "
                "run died while it wrote that file (save_total_limit=1 has removed the checkpoint before by then). "
                "Resume from another one, or start new averages there with AveragingCallback(..., "
                "on_missing_state='restart')."
            )

        def make() -> Averager:
            step = state.global_step if joins else 0
            return self._kind(kwargs["model"], self._rules, step=step, total_steps=state.max_steps, **self._options)

        self.averager = make()
        self._check(trainer, self.averager)
        best = _best(args, state)
        if best is not None and (joins or best / STATE_FILE != stored):
            try:
                self.averager.load(best / STATE_FILE)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"load_best_model_at_end may go back to {best}, where there are no averages of this kind: {error} "
                    "Go on without load_best_model_at_end."
                ) from error
            if joins:
                self.averager = make()
        if stored is not None and not joins:
            try:
                self.averager.load(stored)
            except ValueError as error:
                raise ValueError(
                    f"{stored}: {error} (New averages from this step on: delete the file and pass "
                    "on_missing_state='restart'.)"
                ) from error
        first = _first_evaluation(args, state)
        if first is not None and first <= state.max_steps:
            self._require_followed(trainer, self.averager, first)
        self._attachment = self.averager.attach(kwargs["optimizer"])
        self._saved_step = None
        # First in line at on_evaluate, so that early stopping finds the averages' metrics wherever it was listed.
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(other for other in callbacks if other not in (self, self._last)), self._last]

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate the averages as the live model has just been, and add their metrics to its own."""
        if self.averager is None or self.averager.applied_name or not self._evaluated(self.averager):
            return
        trainer, arguments = calling_trainer(self, "eval_dataset", "ignore_keys", "metric_key_prefix")
        if state.global_step:
            self._require_followed(trainer, self.averager, state.global_step)
        names = [name for name in self._evaluated(self.averager) if self.averager.updates(name)]
        averaged = evaluate_averages(trainer, kwargs["model"], self.averager, names, *arguments)
        if clash := sorted(averaged.keys() & kwargs["metrics"].keys()):
            raise ValueError(f"{', '.join(clash)} are metrics of the live model and of an average; rename the average.")
        kwargs["metrics"].update(averaged)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete the checkpoint that is about to be uploaded, which happens before on_save."""
        # Only the first process gets here, which is not enough to save a sharded model.
        if self.averager is not None and not self.averager.sharded and _checkpoint(args, state).is_dir():
            self._save(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the checkpoint."""
        self._save(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let averages on the host catch up: after its last step the Trainer may put the best weights in the model."""
        if self.averager is not None:
            self.averager.wait()

    def _end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Export the averages; those of the best step, if the Trainer went back to it."""
        if self.averager is None or self._attachment is None:
            return
        trainer, _ = calling_trainer(self)
        self._attachment.remove()
        self._attachment = None
        never = [name for name in self.averager.rules if not self.averager.updates(name)]
        best = _best(args, state)
        if best is not None:
            trainer.accelerator.wait_for_everyone()  # until the first process has written it
            self._go_back(args, self.averager, best)
        self._export(trainer, self.averager, _run_folder(args))
        followed = self._followed(trainer, self.averager)
        if best is not None and followed:
            self.averager.copy_to_model(followed)
            self.averager = None
        if never:
            raise RuntimeError(
                f"training stopped at step {state.global_step}, before the first update of {', '.join(never)}, so "
                "there is no such average; the model and its checkpoints are as the Trainer left them. Train longer, "
                "or choose a smaller update_after or update_freq."
            )

    def _go_back(self, args: TrainingArguments, averager: Averager, best: Path) -> None:
        try:
            averager.load(best / STATE_FILE)
        except (OSError, ValueError) as error:
            # The live weights of the last step are gone from the model, and no average can be read without them.
            kept = _run_folder(args) / STATE_FILE
            if args.should_save or averager.sharded:
                averager.save(kept)
            raise RuntimeError(
                f"the Trainer went back to {best}, but the averages cannot: {error} Their state at step "
                f"{averager.step} is in {kept}; Averager.load reads it beside the live weights of that step."
            ) from error

    def _refuse(self, trainer: Trainer) -> None:
        """Refuse what cannot be averaged, whatever the rules."""
        if any(
            isinstance(other, AveragingCallback) and other is not self for other in trainer.callback_handler.callbacks
        ):
            raise ValueError("this Trainer has two AveragingCallbacks; give one, with a mapping of names to rules.")
        if trainer.state.is_hyper_param_search:
            raise NotImplementedError("AveragingCallback does not support hyperparameter_search; train() each trial.")
        if trainer.is_deepspeed_enabled:
            raise NotImplementedError(
                "AveragingCallback does not support DeepSpeed, whose optimizer does not tell when it has stepped. "
                "Train with FSDP2 (fsdp_version: 2), or in a loop of your own that calls Averager.update()."
            )

    def _check(self, trainer: Trainer, averager: Averager) -> None:
        """Refuse what would fail, or mislead, during training."""
        if unknown := sorted(set(self._evaluated(averager)) - averager.rules.keys()):
            raise ValueError(f"evaluate={unknown} are no averages; there are {', '.join(averager.rules)}.")
        datasets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
        if clash := sorted(datasets.keys() & averager.rules.keys()):
            raise ValueError(f"{clash} name both averages and evaluation datasets; rename the averages.")
        followed = self._followed(trainer, averager)
        if followed and followed not in self._evaluated(averager):
            metric = trainer.args.metric_for_best_model
            raise ValueError(f"metric_for_best_model={metric!r} needs {followed!r}; add it to evaluate.")
        if averager.sharded and _is_adapter(trainer):
            plugin = trainer.accelerator.state.fsdp_plugin
            if plugin is None or "FULL_STATE_DICT" not in str(plugin.state_dict_type):
                raise NotImplementedError(
                    "the Trainer writes a sharded adapter only with the fsdp state_dict_type FULL_STATE_DICT; set that."
                )
        if trainer.args.should_save:
            for name in averager.rules:
                check_destination(_run_folder(trainer.args) / FOLDER / name, [], overwrite=True)

    def _require_followed(self, trainer: Trainer, averager: Averager, step: int) -> None:
        """Refuse an evaluation at ``step`` that lacks the metric which chooses the best model."""
        name = self._followed(trainer, averager)
        if name is None or averager.updates(name):
            return
        rule = averager.rules[name]
        until_then = averager.step + step - trainer.state.global_step
        if count_updates(rule, until_then) <= count_updates(rule, averager.step):
            raise ValueError(
                f"metric_for_best_model={trainer.args.metric_for_best_model!r} is evaluated at step {step}, but before "
                f"the first update of {name!r} ({rule}). Evaluate later with eval_delay, or choose a smaller "
                "update_after or update_freq. (If the metric is the live model's, rename the average.)"
            )

    def _evaluated(self, averager: Averager) -> Collection[str]:
        return averager.rules if self._evaluate is None else self._evaluate

    def _followed(self, trainer: Trainer, averager: Averager) -> str | None:
        metric = trainer.args.metric_for_best_model
        return metric and average_of(metric, averager.rules, trainer.eval_dataset, trainer.state.log_history)

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.averager is None or self._attachment is None or self._saved_step == state.global_step:
            return
        checkpoint = _checkpoint(args, state)
        writes = args.should_save or self.averager.sharded  # shards are gathered from all
        if writes and (not args.save_only_model or args.load_best_model_at_end):
            self.averager.save(checkpoint / STATE_FILE)
        if self._export_at_save:
            self._export(calling_trainer(self)[0], self.averager, checkpoint)
        self._saved_step = state.global_step

    def _export(self, trainer: Trainer, averager: Averager, folder: Path) -> None:
        for name in averager.rules:
            out = folder / FOLDER / name
            if not averager.updates(name):
                logger.warning(f"{name} has had no update at step {averager.step} and is not exported.")
                if trainer.args.should_save:
                    remove_export(out)  # an earlier run's, which would be taken for this one's
            elif averager.sharded and not _is_adapter(trainer):
                # The Trainer would gather the whole model on its first process, or write shards that nothing loads.
                model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
                export_model(averager, model, out, name, tokenizer=tokenizer, overwrite=True)
            else:
                with averager.applied(name):
                    if trainer.args.should_save:
                        with export_folder(out, averager, name) as temporary:
                            trainer.save_model(str(temporary), _internal_call=True)
                    else:
                        trainer.save_model(str(out), _internal_call=True)  # takes part, writes nothing
                logger.info(f"The average {name} is saved in {out}.")


def _run_folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return _run_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _best(args: TrainingArguments, state: TrainerState) -> Path | None:
    """The checkpoint to which the Trainer goes back at the end, as far as is known now; it stays if that is gone."""
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    return Path(best) if best is not None and Path(best).is_dir() else None


def _first_evaluation(args: TrainingArguments, state: TrainerState) -> int | None:
    """The step of the next evaluation, where steps decide."""
    if args.eval_strategy != "steps":
        return None
    return math.ceil(max(state.global_step + 1, args.eval_delay) / state.eval_steps) * state.eval_steps


def _is_adapter(trainer: Trainer) -> bool:
    return hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
