"""The callback that follows a run of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

from lagless.averaging import Attachment, Averager, warn_of_rate
from lagless.integrations._facts import AverageMoments, distance
from lagless.integrations._learning_rates import present_share, scheduled_share
from lagless.integrations._noise import LOGGED, NoiseLog
from lagless.integrations._optimizers import averaged_optimizer, training_weights
from lagless.integrations.lightning._checkpoint import STATE_KEY
from lagless.integrations.lightning._compat import Callback, LightningModule, Trainer, rank_zero_warn
from lagless.integrations.lightning._export import check_export, export, withdraw
from lagless.integrations.lightning._validation import validate_again
from lagless.optim import AveragedOptimizer
from lagless.rules import CheckedCall, Rule, named_rules


class AveragingCallback(CheckedCall, Callback):
    """Averages of the module's weights: validated beside the live ones, kept in every checkpoint, exported at the end.

    ``Trainer(callbacks=[AveragingCallback(EMA(half_life_fraction=0.05))])`` is all. Training is bitwise what it is
    without the callback.

    - Every validation inside ``fit`` is repeated with each selected average in the module, and its metrics are logged
      with the average's name in front: ``val_loss`` gives ``ema_val_loss``. ``ModelCheckpoint``, ``EarlyStopping`` and
      learning rate schedulers can monitor them. An average without an update yet has no metrics. Logged too are its
      ``ema_distance`` from the live weights (Euclidean), ``ema_mean_age``, ``ema_effective_iterates`` and
      ``ema_updates``.
    - Every checkpoint holds the averager's state; ``fit(ckpt_path=...)`` goes on bit for bit. :func:`load_average`
      gives the averaged model in a checkpoint.
    - At the end of training each average is written to ``{name}.ckpt``, for ``load_from_checkpoint``, and to the folder
      ``{name}``: there ``lagless.json`` says what it is, and, where the module holds a Hugging Face model, the rest is
      for ``from_pretrained``. The module keeps the live weights. Only earlier exports are replaced.

    An optimizer with an average of its own (:class:`lagless.optim.PACE`, ``Pullback``, ``PrimalAveraging``) has that
    average validated (``pace_val_loss``) and exported too, as ``pace``.

    A step is one step of the optimizer: once under gradient accumulation, none when the gradient scaler skips it.
    A Trainer takes one such callback; give it several rules as a mapping.

    Args:
        rules: one rule, a mapping of names to rules, or None, as for :class:`lagless.Averager`. Beside an optimizer
            with an average None is for none but that.
        evaluate: the averages to validate, by name; None for all.
        optimizer: with several optimizers, the index of the one whose steps count.
        export: the folder for averaged models; True for ``averaged`` in the run's log folder, False for none.
        on_missing_state: what to do when ``fit`` resumes from a checkpoint without averages: ``"refuse"``, or
            ``"restart"`` them at that step (with several optimizers: at step 0).
        gradient_noise: log the gradient noise scale as ``train/noise_scale``, in samples, by a
            :class:`lagless.GradientNoise` beside the optimizer; a number is that of samples in a microbatch, which the
            data loader knows otherwise. Bias-corrected optimizers have it anyway.
        options: of the :class:`lagless.Averager`: ``dtype``, ``device``, ``start``, ``seed``, ``compile``.

    Attributes:
        averager: the :class:`lagless.Averager`, from the start of training on, and after it.

    Raises:
        ValueError: when training starts, if it is too short for a rule to update, if ``evaluate`` or ``optimizer`` does
            not fit, or if the checkpoint has no averages, or those of other rules or parameters; and at a validation
            before the first update of an average that something monitors.
        CheckpointError: when training starts, if something else is where an average is to be written.
        RuntimeError: when training ends before a rule's first update.
        NotImplementedError: under a strategy that shards parameters.

    Warns:
        AverageWarning: once, on rank 0, of averages as :class:`lagless.Averager` has it, and of a learning rate that
            decays to less than a tenth.

    >>> from lagless import EMA
    >>> callback = AveragingCallback(EMA(half_life_fraction=0.05))
    """

    _options_of = (Averager,)

    def __init__(
        self,
        rules: Rule | Mapping[str, Rule] | None = None,
        *,
        evaluate: str | Collection[str] | None = None,
        optimizer: int | None = None,
        export: bool | str | PathLike[str] = True,
        on_missing_state: Literal["refuse", "restart"] = "refuse",
        gradient_noise: bool | float = False,
        **options: Any,
    ) -> None:
        if on_missing_state not in ("refuse", "restart"):
            raise ValueError(f"on_missing_state={on_missing_state!r}; it must be 'refuse' or 'restart'.")
        self.averager: Averager | None = None
        self._rules = None if rules is None else named_rules(rules)
        self._evaluate = [evaluate] if isinstance(evaluate, str) else evaluate
        self._optimizer = optimizer
        self._export = export
        self._on_missing_state = on_missing_state
        self._options = options
        self._noise = NoiseLog(gradient_noise)
        self._moments: dict[str, AverageMoments] = {}
        self._started = 0
        self._attachment: Attachment | None = None
        self._own: AveragedOptimizer | None = None
        self._loaded: Any = None
        self._left: tuple[LightningModule, int] | None = None
        self._warned = False  # of a learning rate that decays

    @property
    def state_key(self) -> str:
        """The key of the averages among a checkpoint's callbacks."""
        return STATE_KEY

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind the other callbacks: an error at the end of training keeps it from those that come later."""
        self._loaded = None
        trainer.callbacks = [*self._others(trainer), self]

    def state_dict(self) -> dict[str, Any]:
        """The averages, as part of a checkpoint."""
        if self.averager is None:
            return {}
        return {"averages": self.averager.state_dict(), "dtype": self._options.get("dtype")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the averages of a checkpoint until training starts, when the module holds its weights."""
        self._loaded = state_dict["averages"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, resume or continue the averages, and follow the optimizer."""
        self._detach()
        optimizer = self._followed(trainer)
        self._own = averaged_optimizer(optimizer)
        if self._own is not None:
            self._own.train()  # averages begin with the live weights
        continues = self._left == (pl_module, trainer.global_step) and not trainer.ckpt_path
        if self._rules is None and self._own is not None and self._loaded is None:
            self.averager = None
        elif self._loaded is not None or not continues:
            self.averager = self._begin(trainer, pl_module)
        names = self._names
        if unknown := sorted(set(self._evaluate or ()) - names.keys()):
            raise ValueError(f"evaluate={unknown} are no averages; there are {', '.join(names)}.")
        if self._own is not None and self.averager is not None and self._own.average_name in self.averager.rules:
            raise ValueError(
                f"{self._own.average_name!r} is the average of the optimizer; rename the rule of that name."
            )
        folder = self._folder(trainer)
        if folder and trainer.is_global_zero:
            for name in names:
                check_export(folder, name)
        if self.averager is not None:
            self._attachment = self.averager.attach(optimizer)
            self._warned = warn_of_rate(_planned_share(trainer, optimizer))
        size = getattr(trainer.train_dataloader, "batch_size", None)
        self._noise.begin(
            optimizer,
            pl_module,
            batch=size if isinstance(size, int) else None,
            microbatches=trainer.accumulate_grad_batches if pl_module.automatic_optimization else 2,
            ranks=trainer.world_size,
            shifted=True,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the gradient noise scale, as often as Lightning logs steps."""
        if trainer.global_step % trainer.log_every_n_steps == 0 and (scale := self._noise.value()) is not None:
            pl_module.log(f"train/{LOGGED}", scale)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move before the callbacks that monitor metrics, and behind the progress bar, which counts each pass alone."""
        bar, others = trainer.progress_bar_callback, self._others(trainer)
        trainer.callbacks = [self, *others] if bar is None else [bar, self, *(c for c in others if c is not bar)]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the averages too."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._validate(trainer)
        trainer.callbacks = [*self._others(trainer), self]

    def _validate(self, trainer: Trainer) -> None:
        for name, holder in self._names.items():
            if self._evaluate is not None and name not in self._evaluate:
                continue
            if holder.updates(name) == 0:
                about = f"{name!r} ({holder.rules[name]})" if isinstance(holder, Averager) else repr(name)
                if monitored := _monitored(trainer, f"{name}_"):
                    raise ValueError(
                        f"{', '.join(monitored)} is monitored, and validated at step {_step_of(holder)}, but before "
                        f"the first update of {about}. Validate later with check_val_every_n_epoch or "
                        "val_check_interval, or choose a smaller update_after or update_freq."
                    )
                rank_zero_warn(f"{about} has had no update yet, so this validation has no {name}_ metrics.")
                continue
            facts = self._facts(trainer, holder, name)
            with self._applied(trainer, holder, name):
                validate_again(trainer, f"{name}_", facts)

    def _facts(self, trainer: Trainer, holder: Averager | AveragedOptimizer, name: str) -> dict[str, float]:
        if not isinstance(holder, Averager):
            return {"updates": float(holder.updates(name))}
        with training_weights(self._followed(trainer)):
            found = {"distance": distance(holder, name, trainer.lightning_module)}
        if name not in self._moments:
            self._moments[name] = AverageMoments(holder.rules[name], self._started)
        known = self._moments[name].at(holder.step)
        mean_age, effective_iterates = known or (float("nan"), float("nan"))
        found |= {"updates": float(holder.updates(name))}
        return found | {"mean_age": mean_age, "effective_iterates": effective_iterates}

    @contextmanager
    def _applied(self, trainer: Trainer, holder: Averager | AveragedOptimizer, name: str) -> Iterator[None]:
        """The average in the module, whichever mode its optimizer is in and whichever the module's hooks ask it for."""
        if isinstance(holder, AveragedOptimizer):
            holder.train()
            with holder.applied(name):
                yield
        else:
            with training_weights(self._followed(trainer)), holder.applied(name):
                yield

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the averaged models."""
        self._detach()
        self._left = (pl_module, trainer.global_step)
        averager, names = self.averager, self._names
        if averager is not None:
            averager.wait()  # whoever has fitted the module may load other weights into it
            averager.warn_of_weights()
            self._warned = self._warned or warn_of_rate(present_share(self._followed(trainer)))
        never = [name for name, holder in names.items() if holder.updates(name) == 0]
        if folder := self._folder(trainer):
            for name, holder in names.items():
                if name not in never:
                    with self._applied(trainer, holder, name):
                        export(trainer, pl_module, holder, folder, name)
                elif trainer.is_global_zero:
                    withdraw(folder, name)
        if self._own is not None and self._own.average_name in never:
            rank_zero_warn(
                f"{self._own.average_name} has had no update in {_step_of(self._own)} steps: no average of it."
            )
            never.remove(self._own.average_name)
        if averager is not None and never and not trainer.fast_dev_run:
            raise RuntimeError(
                f"training stopped at step {averager.step}, before the first update of {', '.join(never)}, so "
                "there is no such average. Train longer, or choose a smaller update_after or update_freq."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer."""
        self._detach()
        if self.averager is not None:
            with suppress(RuntimeError):  # that of an update that failed, which every later call raises as well
                self.averager.wait()

    @property
    def _names(self) -> dict[str, Averager | AveragedOptimizer]:
        """Every average, and what holds it."""
        averager, own = self.averager, self._own
        names: dict[str, Averager | AveragedOptimizer] = (
            {} if averager is None else dict.fromkeys(averager.rules, averager)
        )
        return names if own is None else {**names, own.average_name: own}

    def _others(self, trainer: Trainer) -> list[Any]:
        return [callback for callback in trainer.callbacks if callback is not self]

    def _folder(self, trainer: Trainer) -> Path | None:
        """Where averaged models go, if anywhere."""
        run = trainer.log_dir or trainer.default_root_dir  # asked on every rank, as Lightning demands
        if not self._export or trainer.fast_dev_run:
            return None
        return Path(run, "averaged") if self._export is True else Path(self._export).expanduser()

    def _begin(self, trainer: Trainer, module: LightningModule) -> Averager:
        self._moments, self._started = {}, 0
        if trainer.strategy.restore_checkpoint_after_setup:
            raise NotImplementedError(
                f"{type(trainer.strategy).__name__} shards parameters, which AveragingCallback does not support. "
                "Use one device or DDP."
            )
        if self._loaded is not None:
            averager = Averager(module, self._rules, **self._options)
            try:
                averager.load_state_dict(self._loaded)
            except ValueError as error:
                raise ValueError(f"{trainer.ckpt_path}: {error}") from error
            self._loaded = None
            return averager
        if trainer.global_step > 0 and self._on_missing_state == "refuse":
            raise ValueError(
                f"{trainer.ckpt_path or 'the earlier fit'} holds no averages at step {trainer.global_step}: it went "
                "without the callback. Resume from another one, or start new averages there with "
                "AveragingCallback(..., on_missing_state='restart')."
            )
        step = trainer.global_step if len(trainer.optimizers) == 1 else 0  # it counts the steps of all of them
        self._started = step
        return Averager(module, self._rules, step=step, total_steps=_known_length(trainer, module), **self._options)

    def _followed(self, trainer: Trainer) -> Optimizer:
        optimizers = trainer.optimizers
        if len(optimizers) == 1 and self._optimizer is None:
            return optimizers[0]
        if self._optimizer is None or not 0 <= self._optimizer < len(optimizers):
            raise ValueError(
                f"optimizer={self._optimizer}, and the module has {len(optimizers)} optimizers; say whose steps count, "
                "as an index into trainer.optimizers."
            )
        return optimizers[self._optimizer]

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        self._noise.end()


def _step_of(holder: Averager | AveragedOptimizer) -> int:
    return holder.step if isinstance(holder, Averager) else holder.steps_taken


def _monitored(trainer: Trainer, prefix: str) -> list[str]:
    """The metrics of one average without which Lightning would stop: ``{prefix}`` before one of the live model's."""
    watchers = [w for w in (*trainer.callbacks, *trainer.lr_scheduler_configs) if getattr(w, "strict", True)]
    monitors = [getattr(w, "monitor", None) for w in watchers if getattr(w, "reduce_on_plateau", True)]
    metrics = [f"{prefix}{metric}" for metric in trainer.callback_metrics]
    return [] if trainer.fast_dev_run else [metric for metric in metrics if metric in monitors]


def _known_length(trainer: Trainer, module: LightningModule) -> int | None:
    """The optimizer steps of the whole run, where they are sure."""
    steps = trainer.estimated_stepping_batches
    sure = module.automatic_optimization and not trainer.fast_dev_run and 0 < steps < float("inf")
    return int(steps) if sure else None


def _planned_share(trainer: Trainer, optimizer: Optimizer) -> float:
    """The learning rate at the end of the run in units of its peak; NaN where that cannot be told."""
    steps = trainer.estimated_stepping_batches
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is optimizer and steps < float("inf"):
            calls = int(steps) if config.interval == "step" else trainer.max_epochs or 0
            return scheduled_share(config.scheduler, calls // config.frequency)
    return float("nan")
