"""The callback for transformers.Trainer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from lagless.averaging import Attachment, Averager, HoldsAverages, warn_of_rate
from lagless.checkpoints import check_destination
from lagless.integrations._exports import base_model_name, describe, export_folder, remove_export
from lagless.integrations._facts import AverageMoments
from lagless.integrations._learning_rates import present_share, scheduled_share
from lagless.integrations._noise import LOGGED, NoiseLog
from lagless.integrations._optimizers import averaged_optimizer, training_weights
from lagless.integrations.distributed import export_model
from lagless.integrations.transformers._caller import BoundTrainer, calling_trainer
from lagless.integrations.transformers._compat import (
    EVALUATE_ARGUMENTS,
    TRAIN_ARGUMENTS,
    callbacks_of,
    save_quietly,
)
from lagless.integrations.transformers._evaluation import average_of, evaluate_averages, log_average, losses_of
from lagless.integrations.transformers._lora import MergedLoraAverager, is_adapter
from lagless.integrations.transformers._optimizer_average import OptimizerAverage
from lagless.integrations.transformers._returned_model import forget_record, record_saves
from lagless.rules import CheckedCall, Rule, count_updates, named_rules

STATE_FILE = "averages.safetensors"
FOLDER = "averaged"

logger = logging.get_logger(__name__)


class AveragingCallback(CheckedCall, TrainerCallback):
    """Averages in a ``transformers.Trainer`` or any trainer derived from it: followed, evaluated, saved, exported.

    - **Steps.** An update counts optimizer steps: one per accumulated batch, none where a gradient scaler skipped.
    - **Evaluation.** Whatever the Trainer evaluates is evaluated with each average too. The metrics of the average
      ``name`` are called ``eval_{name}_loss`` and so on (``eval_{dataset}_{name}_loss`` with a dictionary of datasets),
      and ``metric_for_best_model``, early stopping and learning-rate schedules may follow them. The training run stays
      bitwise what it would have been.
      Beside the metrics stand, under the same prefix, the average's ``distance`` from the live weights (Euclidean), its
      ``mean_age`` in steps, ``effective_iterates`` and ``updates``.
    - **Checkpoints.** Each ``checkpoint-N`` gets ``averages.safetensors``; a resumed run continues bit for bit.
      Under ``save_only_model`` it is left out, like the optimizer's state, unless ``load_best_model_at_end`` needs it.
    - **The end.** ``output_dir/averaged/{name}`` is the average as a model, or adapter, ready to load. With
      ``load_best_model_at_end`` the averages go back to the best step along with the live weights, and if
      ``metric_for_best_model`` is an average's, that average is the model which the Trainer then holds.
    - **Optimizers with an average** (:class:`lagless.optim.PACE`, ``Pullback``, ``PrimalAveraging``): the Trainer
      evaluates their average as its model, and its metrics get a second name, ``eval_pace_loss``. Checkpoints hold the
      live weights. After training the Trainer's model is the average, that of the best step with
      ``load_best_model_at_end``.
    - **Records.** If the Trainer's model is an average after training, ``trainer.save_model`` writes ``lagless.json``
      beside it, which says so.

    Args:
        rules: one rule, or a mapping of names to rules. A single rule is named by its class in lower case. None for
            ``EMA(half_life_fraction=0.05)``, the same average at every length of run, or, beside an optimizer with an
            average, for none but that.
        evaluate: the averages to evaluate, by name; None for all.
        export_at_save: write ``checkpoint-N/averaged/{name}`` at each save as well.
        on_missing_state: what to do when the checkpoint to resume from has no averages: ``"refuse"``, or ``"restart"``
            them at that step.
        merged_lora: for a PEFT model, average the update BA of each LoRA layer instead of A and B, and take its nearest
            adapter of the same rank. Costs a float32 copy of the adapted layers' weights per buffer.
        gradient_noise: log the gradient noise scale as ``noise_scale`` (``train/noise_scale`` in TensorBoard and
            elsewhere), in sequences, by a :class:`lagless.GradientNoise` beside the optimizer; a number is that of
            samples in a microbatch. Bias-corrected optimizers have it anyway.
        options: of the :class:`lagless.Averager`: ``dtype``, ``device``, ``start``, ``seed``, ``compile``.

    Attributes:
        averager: the Averager of the present or latest run; None before, and once the model itself is an average.

    Raises:
        ValueError: at the start of training, if a rule would have no update in it or anything else does not fit.
        RuntimeError: at the end of training, if it stopped before a rule's first update.

    Warns:
        AverageWarning: once, on rank 0, of averages as :class:`lagless.Averager` has it, and of a learning rate that
            decays to less than a tenth.

    >>> from lagless import EMA
    >>> callback = AveragingCallback(EMA(half_life_fraction=0.05))
    >>> # Trainer(..., callbacks=[callback])
    """

    _options_of = (Averager,)

    def __init__(
        self,
        rules: Rule | Mapping[str, Rule] | None = None,
        *,
        evaluate: str | Collection[str] | None = None,
        export_at_save: bool = False,
        on_missing_state: Literal["refuse", "restart"] = "refuse",
        merged_lora: bool = False,
        gradient_noise: bool | float = False,
        **options: Any,
    ) -> None:
        if on_missing_state not in ("refuse", "restart"):
            raise ValueError(f"on_missing_state={on_missing_state!r}; it must be 'refuse' or 'restart'.")
        self.averager: Averager | None = None
        self._rules, self._options = (None if rules is None else named_rules(rules)), options
        self._kind = MergedLoraAverager if merged_lora else Averager
        self._evaluate = [evaluate] if isinstance(evaluate, str) else evaluate
        self._export_at_save = export_at_save
        self._on_missing_state = on_missing_state
        self._noise = NoiseLog(gradient_noise)
        self._moments: dict[str, AverageMoments] = {}
        self._attachment: Attachment | None = None
        self._own: OptimizerAverage | None = None
        self._bound: BoundTrainer | None = None
        self._training = False
        self._warned = False  # of a learning rate that decays
        self._saved_step: int | None = None
        # An error in the Trainer's last event keeps it from the callbacks that come later.
        self._last = TrainerCallback()
        self._last.on_train_end = self._end

    def bind(self, trainer: Trainer) -> AveragingCallback:
        """Hand the Trainer over, and return this callback, which is among its callbacks from here on.

        An event tells a callback neither which Trainer raised it nor what that was called with. Bound, the callback
        knows: ``trainer.train`` and ``trainer.evaluate`` note their arguments. Unbound, it looks for them among the
        variables of its callers, which works with the Trainers of transformers and TRL as they are now.

        Args:
            trainer: before training; a callback serves one Trainer.

        Raises:
            ValueError: if the callback is bound already.

        >>> # callback = AveragingCallback().bind(trainer)
        """
        if self._bound is not None:
            raise ValueError("this AveragingCallback is bound to a Trainer already; make one for each Trainer.")
        self._bound = BoundTrainer(trainer)
        if self not in callbacks_of(trainer):
            trainer.add_callback(self)
        return self

    def _caller(self, state: TrainerState, *arguments: str) -> tuple[Trainer, list[Any]]:
        return calling_trainer(self, *arguments, bound=self._bound, state=state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the Averager, or restore it, and follow the optimizer."""
        trainer, [checkpoint] = self._caller(state, *TRAIN_ARGUMENTS)
        self._refuse(trainer)
        forget_record(trainer)
        if self._attachment is not None:  # of a run that ended in an error, such as one batch size too many
            self._attachment.remove()
        optimizer, model = kwargs["optimizer"], kwargs["model"]
        averaged = averaged_optimizer(optimizer)
        self.averager, self._own = None, averaged and OptimizerAverage(averaged, model)
        if hasattr(optimizer, "train"):  # as the Trainer does before each batch; what follows needs the live weights
            optimizer.train()
        if self._rules is not None or self._own is None:
            self._begin(trainer, state, model, checkpoint)
        self._check(trainer)
        self._attachment = None if self.averager is None else self.averager.attach(optimizer)
        self._warned = self.averager is None or warn_of_rate(scheduled_share(kwargs["lr_scheduler"], state.max_steps))
        self._noise.begin(
            optimizer,
            model,
            batch=args.train_batch_size,
            microbatches=args.gradient_accumulation_steps,
            ranks=args.world_size,
            shifted=not getattr(getattr(model, "config", None), "is_encoder_decoder", False),
        )
        self._training, self._saved_step = True, None
        # First in line at on_evaluate, so that early stopping finds the averages' metrics wherever it was listed.
        callbacks = callbacks_of(trainer)
        callbacks[:] = [self, *(other for other in callbacks if other not in (self, self._last)), self._last]

    def _begin(self, trainer: Trainer, state: TrainerState, model: nn.Module, checkpoint: str | None) -> None:
        """Make the Averager, or restore it."""
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
            return self._kind(model, self._rules, step=step, total_steps=state.max_steps, **self._options)

        self.averager = make()
        best = _best(trainer.args, state)
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
        start = state.global_step if joins else 0
        self._moments = {name: AverageMoments(rule, start) for name, rule in self.averager.rules.items()}
        first = _first_evaluation(trainer.args, state)
        if first is not None and first <= state.max_steps:
            self._require_followed(trainer, self.averager, first)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate the averages as the live model has just been, and add their metrics to its own."""
        if (self.averager is None or not self.averager.applied_name) and self._evaluated():
            self._evaluate_averages(state, kwargs["model"], kwargs["metrics"])
        if self._training and self._own is not None:
            self._own.optimizer.train()  # so that a checkpoint holds the live weights

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the gradient noise scale to what is logged with the training loss."""
        if self._training and logs is not None and "loss" in logs and (scale := self._noise.value()) is not None:
            logs[LOGGED] = scale
            state.log_history[-1][LOGGED] = scale

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Go back to the live weights: the Trainer predicts with the average of an optimizer that keeps one."""
        if self._training and self._own is not None:
            self._own.optimizer.train()

    def _evaluate_averages(self, state: TrainerState, model: nn.Module, metrics: dict[str, float]) -> None:
        trainer, arguments = self._caller(state, *EVALUATE_ARGUMENTS)
        averaged: dict[str, float] = {}
        if self._own is not None and self._own.name in self._evaluated():
            prefix = arguments[2]
            averaged |= self._own.metrics(metrics, prefix)
            averaged |= log_average(trainer, averaged, f"{prefix}_{self._own.name}", prefix) if averaged else {}
        if self.averager is not None:
            if state.global_step:
                self._require_followed(trainer, self.averager, state.global_step)
            names = [n for n in self.averager.rules if n in self._evaluated() and self.averager.updates(n)]
            with training_weights(trainer.optimizer):
                averaged |= evaluate_averages(trainer, model, self.averager, names, *arguments, moments=self._moments)
        if clash := sorted(averaged.keys() & metrics.keys()):
            raise ValueError(f"{', '.join(clash)} are metrics of the live model and of an average; rename the average.")
        metrics.update(averaged)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete the checkpoint that is about to be uploaded, which happens before on_save."""
        # Only the first process gets here, which is not enough to save a sharded model.
        if not (self._sharded and self.averager is not None) and _checkpoint(args, state).is_dir():
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
        if not self._training:
            return
        trainer, _ = self._caller(state)
        self._noise.end()
        self._training = False
        best = _best(args, state)
        if best is not None:
            trainer.accelerator.wait_for_everyone()  # until the first process has written it
        if self._own is not None and best is not None:
            self._own.keep()  # the live weights of the best step
        never = [] if self.averager is None else self._end_averager(trainer, args, self.averager, best)
        if self._own is not None:
            self._own.become_model(trainer, best, _run_folder(args) / FOLDER / self._own.name)
        if never:
            raise RuntimeError(
                f"training stopped at step {state.global_step}, before the first update of {', '.join(never)}, so "
                "there is no such average; the model and its checkpoints are as the Trainer left them. Train longer, "
                "or choose a smaller update_after or update_freq."
            )

    def _end_averager(
        self, trainer: Trainer, args: TrainingArguments, averager: Averager, best: Path | None
    ) -> list[str]:
        """Export the averages of the Averager, and return those that never were."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        never = [name for name in averager.rules if not averager.updates(name)]
        averager.warn_of_weights()
        self._warned = self._warned or warn_of_rate(present_share(trainer.optimizer))
        if best is not None:
            self._go_back(args, averager, best)
        with training_weights(trainer.optimizer):
            self._export(trainer, averager, _run_folder(args))
        followed = self._followed(trainer, averager.rules)
        if best is not None and followed:
            record = describe(averager, followed)
            averager.copy_to_model(followed)
            self.averager = None
            if self._own is not None:
                self._own.show()
                self._own = None
            record_saves(trainer, record)
        return never

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
                f"{averager.step} is in {kept}; Averager.load(..., check_live=False) reads it beside the live weights "
                "of that step."
            ) from error

    def _refuse(self, trainer: Trainer) -> None:
        """Refuse what cannot be averaged, whatever the rules."""
        if any(isinstance(other, AveragingCallback) and other is not self for other in callbacks_of(trainer)):
            raise ValueError("this Trainer has two AveragingCallbacks; give one, with a mapping of names to rules.")
        if trainer.state.is_hyper_param_search:
            raise NotImplementedError("AveragingCallback does not support hyperparameter_search; train() each trial.")
        if trainer.is_deepspeed_enabled:
            raise NotImplementedError(
                "AveragingCallback does not support DeepSpeed, whose optimizer does not tell when it has stepped. "
                "Train with FSDP2 (fsdp_version: 2), or in a loop of your own that calls Averager.update()."
            )

    def _check(self, trainer: Trainer) -> None:
        """Refuse what would fail, or mislead, during training."""
        names = self._names
        if unknown := sorted(set(self._evaluated()) - names.keys()):
            raise ValueError(f"evaluate={unknown} are no averages; there are {', '.join(names)}.")
        datasets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
        if clash := sorted(datasets.keys() & names.keys()):
            raise ValueError(f"{clash} name both averages and evaluation datasets; rename the averages.")
        if self._own is not None and self.averager is not None and self._own.name in self.averager.rules:
            raise ValueError(f"{self._own.name!r} is the average of the optimizer; rename the rule of that name.")
        followed = self._followed(trainer, names)
        if followed and followed not in self._evaluated():
            metric = trainer.args.metric_for_best_model
            raise ValueError(f"metric_for_best_model={metric!r} needs {followed!r}; add it to evaluate.")
        if self._own is not None:
            self._own.check(trainer.args, _best(trainer.args, trainer.state), trainer.state)
        if self._sharded and is_adapter(trainer):
            plugin = trainer.accelerator.state.fsdp_plugin
            if plugin is None or "FULL_STATE_DICT" not in str(plugin.state_dict_type):
                raise NotImplementedError(
                    "the Trainer writes a sharded adapter only with the fsdp state_dict_type FULL_STATE_DICT; set that."
                )
        if trainer.args.should_save:
            for name in names:
                check_destination(_run_folder(trainer.args) / FOLDER / name, [], overwrite=True)

    def _require_followed(self, trainer: Trainer, averager: Averager, step: int) -> None:
        """Refuse an evaluation at ``step`` that lacks the metric which chooses the best model."""
        name = self._followed(trainer, averager.rules)
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

    @property
    def _names(self) -> dict[str, HoldsAverages]:
        """Every average, and what holds it."""
        averager, own = self.averager, self._own
        names: dict[str, HoldsAverages] = {} if averager is None else dict.fromkeys(averager.rules, averager)
        return names if own is None else {**names, own.name: own.optimizer}

    @property
    def _sharded(self) -> bool:
        return any(held is not None and held.sharded for held in (self.averager, self._own))

    def _evaluated(self) -> Collection[str]:
        return self._names if self._evaluate is None else self._evaluate

    def _followed(self, trainer: Trainer, names: Iterable[str]) -> str | None:
        metric = trainer.args.metric_for_best_model
        return metric and average_of(metric, names, trainer.eval_dataset, trainer.state.log_history)

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self._training or self._saved_step == state.global_step:
            return
        checkpoint, own = _checkpoint(args, state), self._own
        if self.averager is not None:
            writes = args.should_save or self.averager.sharded  # shards are gathered from all
            if writes and (not args.save_only_model or args.load_best_model_at_end):
                self.averager.save(checkpoint / STATE_FILE)
            if self._export_at_save:
                trainer, _ = self._caller(state)
                with training_weights(trainer.optimizer):
                    self._export(trainer, self.averager, checkpoint)
        if own is not None and args.load_best_model_at_end and args.should_save:
            own.save(checkpoint)
        self._saved_step = state.global_step

    def _export(self, trainer: Trainer, averager: Averager, folder: Path) -> None:
        for name in averager.rules:
            out = folder / FOLDER / name
            if not averager.updates(name):
                logger.warning(f"{name} has had no update at step {averager.step} and is not exported.")
                if trainer.args.should_save:
                    remove_export(out)  # an earlier run's, which would be taken for this one's
            elif averager.sharded and not is_adapter(trainer):
                # The Trainer would gather the whole model on its first process, or write shards that nothing loads.
                model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
                export_model(averager, model, out, name, tokenizer=tokenizer, overwrite=True)
            else:
                with averager.applied(name):
                    if trainer.args.should_save:
                        record = describe(averager, name) | losses_of(trainer, name)
                        base = base_model_name(trainer.accelerator.unwrap_model(trainer.model))
                        with export_folder(out, record, base) as temporary:
                            save_quietly(trainer, temporary)
                    else:
                        save_quietly(trainer, out)  # takes part, writes nothing
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
