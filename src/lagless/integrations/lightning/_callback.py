"""The callback that follows a run of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

from lagless.averaging import Attachment, Averager
from lagless.integrations.lightning._checkpoint import STATE_KEY
from lagless.integrations.lightning._export import export
from lagless.integrations.lightning._imports import Callback, LightningModule, Trainer, rank_zero_warn
from lagless.integrations.lightning._validation import validate_again
from lagless.rules import Rule


class AveragingCallback(Callback):
    """Averages of the module's weights: validated beside the live ones, kept in every checkpoint, exported at the end.

    ``Trainer(callbacks=[AveragingCallback(BEMA())])`` is all. Training is bitwise what it is without the callback.

    - Every validation inside ``fit`` is repeated with each selected average in the module, and its metrics are logged
      with the average's name in front: ``val_loss`` gives ``bema_val_loss``. ``ModelCheckpoint``, ``EarlyStopping`` and
      learning rate schedulers can monitor them. An average without an update yet has no metrics.
    - Every checkpoint holds the averager's state; ``fit(ckpt_path=...)`` goes on bit for bit. :func:`load_average`
      gives the averaged model in a checkpoint.
    - At the end of training each average is written to ``{name}.ckpt``, for ``load_from_checkpoint``, and, where the
      module holds a Hugging Face model, to the folder ``{name}``, for ``from_pretrained``. The module keeps the live
      weights.

    A step is one step of the optimizer: once under gradient accumulation, none when the gradient scaler skips it.

    Args:
        rules: one rule, or a mapping of names to rules, as for :class:`lagless.Averager`.
        evaluate: names of the averages to validate; None for all.
        optimizer: with several optimizers, the index of the one whose steps count.
        export: the folder for averaged models; True for ``averaged`` in the run's log folder, False for none.
        on_missing_state: what to do when ``fit`` resumes from a checkpoint without averages: ``"refuse"``, or
            ``"restart"`` them at that step (with several optimizers: at step 0).
        options: of the :class:`lagless.Averager`: ``dtype``, ``device``, ``start``, ``seed``, ``compile``.

    Attributes:
        averager: the :class:`lagless.Averager`, from the start of training on, and after it.

    Raises:
        ValueError: when training starts, if it is too short for a rule to update, if ``evaluate`` or ``optimizer`` does
            not fit, or if the checkpoint belongs to other rules or parameters.
        RuntimeError: when training starts from a checkpoint without averages; or when it ends before a rule's first
            update.
        NotImplementedError: under a strategy that shards parameters.

    >>> from lagless import BEMA, EMA
    >>> callback = AveragingCallback({"bema": BEMA(update_freq=100), "ema": EMA(update_freq=100)}, evaluate=["bema"])
    """

    def __init__(
        self,
        rules: Rule | Mapping[str, Rule],
        *,
        evaluate: Collection[str] | None = None,
        optimizer: int | None = None,
        export: bool | str | PathLike[str] = True,
        on_missing_state: Literal["refuse", "restart"] = "refuse",
        **options: Any,
    ) -> None:
        if on_missing_state not in ("refuse", "restart"):
            raise ValueError(f"on_missing_state={on_missing_state!r}; it is 'refuse' or 'restart'.")
        self.averager: Averager | None = None
        self._rules = rules
        self._evaluate = evaluate
        self._optimizer = optimizer
        self._export = export
        self._on_missing_state = on_missing_state
        self._options = options
        self._attachment: Attachment | None = None
        self._loaded: Any = None
        self._left: tuple[LightningModule, int] | None = None

    @property
    def state_key(self) -> str:
        """The key of the averages among a checkpoint's callbacks."""
        return STATE_KEY

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move before the callbacks that monitor metrics, and behind the progress bar, which counts each pass alone."""
        self._loaded = None
        bar = trainer.progress_bar_callback
        others = [callback for callback in trainer.callbacks if callback is not self and callback is not bar]
        trainer.callbacks = [bar, self, *others] if bar else [self, *others]

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
        continues = self._left == (pl_module, trainer.global_step) and not trainer.ckpt_path
        if self._loaded is not None or not continues:
            self.averager = self._begin(trainer, pl_module)
        assert self.averager is not None
        if unknown := sorted(set(self._evaluate or ()) - self.averager.rules.keys()):
            raise ValueError(f"evaluate names {', '.join(unknown)}; the averages are {', '.join(self.averager.rules)}.")
        self._attachment = self.averager.attach(optimizer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the averages too."""
        averager = self.averager
        if averager is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        for name, rule in averager.rules.items():
            if self._evaluate is not None and name not in self._evaluate:
                continue
            if averager.updates(name) == 0:
                rank_zero_warn(f"{name!r} ({rule}) has had no update yet, so this validation has no {name}_ metrics.")
                continue
            with averager.applied(name):
                validate_again(trainer, f"{name}_")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the averaged models."""
        self._detach()
        self._left = (pl_module, trainer.global_step)
        averager = self.averager
        if averager is None or trainer.fast_dev_run:
            return
        trained = [name for name in averager.rules if averager.updates(name) > 0]
        if self._export:
            run = trainer.log_dir or trainer.default_root_dir  # asked on every rank, as Lightning demands
            folder = Path(run, "averaged") if self._export is True else Path(self._export)
            for name in trained:
                with averager.applied(name):
                    export(trainer, pl_module, folder, name)
        if lacking := [f"{name} ({rule})" for name, rule in averager.rules.items() if name not in trained]:
            raise RuntimeError(
                f"training ended after {averager.step} optimizer steps, before the first update of "
                f"{', '.join(lacking)}: there is no average to export. Choose a smaller update_after or update_freq."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer."""
        self._detach()

    def _begin(self, trainer: Trainer, module: LightningModule) -> Averager:
        if trainer.strategy.restore_checkpoint_after_setup:
            raise NotImplementedError(
                f"{type(trainer.strategy).__name__} shards parameters, which AveragingCallback does not support. "
                "Use one device or DDP."
            )
        if self._loaded is not None:
            averager = Averager(module, self._rules, **self._options)
            averager.load_state_dict(self._loaded)
            self._loaded = None
            return averager
        if trainer.global_step > 0 and self._on_missing_state == "refuse":
            raise RuntimeError(
                f"training goes on at step {trainer.global_step}, and {trainer.ckpt_path or 'the earlier fit'} holds "
                "no averages of it. Resume from a checkpoint written with AveragingCallback, or begin new averages "
                "here with AveragingCallback(..., on_missing_state='restart')."
            )
        step = trainer.global_step if len(trainer.optimizers) == 1 else 0  # it counts the steps of all of them
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


def _known_length(trainer: Trainer, module: LightningModule) -> int | None:
    """The optimizer steps of the whole run, where they are sure."""
    steps = trainer.estimated_stepping_batches
    sure = module.automatic_optimization and not trainer.fast_dev_run and 0 < steps < float("inf")
    return int(steps) if sure else None
