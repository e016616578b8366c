"""An averaged policy as the reference of preference optimization and of reinforcement learning.

TRL's trainers compare the policy with a reference: a second model, or, for an adapter, the base model with the adapter
switched off. Here the reference is an average of the policy, and moves with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lagless._validation import require_integer
from lagless.averaging import Attachment, Averager, unwrap
from lagless.integrations.transformers._caller import calling_trainer
from lagless.integrations.transformers._compat import TRAIN_ARGUMENTS
from lagless.rules import CheckedCall, Rule, default_rule

REFERENCE_FILE = "reference.safetensors"
_NAME = "reference"


class MovingReferenceCallback(CheckedCall, TrainerCallback):
    """Make an average of the policy the reference of TRL's ``DPOTrainer``, ``GRPOTrainer`` and their kin.

    - **Whole models.** The trainer's own ``ref_model`` gets the average after every ``sync_every`` steps.
    - **Adapters.** There is no second model: wherever the trainer would switch the adapter off, the averaged adapter
      takes its place, at the cost of one more adapter in memory. An adapter ``ref`` that TRL has made gets the average.
    - **Checkpoints** get ``reference.safetensors``; a resumed run goes on bit for bit.

    The reference is the policy at the start until the rule's first update.

    Args:
        rule: the averaging rule; None for ``EMA(half_life_fraction=0.05)``.
        sync_every: optimizer steps between two moves of the reference; the average follows every step in any case.
        on_missing_state: what to do when the checkpoint to resume from has no reference: ``"refuse"``, or ``"restart"``
            the average at that step.
        options: of the :class:`lagless.Averager`: ``dtype``, ``device``, ``seed``, ``compile``.

    Attributes:
        averager: the Averager of the present or latest run.

    Raises:
        ValueError: at the start of training, if there is no reference to move, if something else moves it, or if it is
            another model than the policy.
        NotImplementedError: for sharded models.

    Reference:
        EMA-PG (2026), arXiv 2602.04417, for an EMA of the policy as the anchor of policy gradients.

    >>> from lagless import EMA
    >>> callback = MovingReferenceCallback(EMA(half_life=100))
    >>> # DPOTrainer(..., callbacks=[callback])
    """

    _options_of = (Averager,)

    def __init__(
        self,
        rule: Rule | None = None,
        *,
        sync_every: int = 1,
        on_missing_state: Literal["refuse", "restart"] = "refuse",
        **options: Any,
    ) -> None:
        if on_missing_state not in ("refuse", "restart"):
            raise ValueError(f"on_missing_state={on_missing_state!r}; it must be 'refuse' or 'restart'.")
        self.averager: Averager | None = None
        self._rule, self._options = rule, options
        self._sync_every = require_integer("sync_every", sync_every, minimum=1)
        self._on_missing_state = on_missing_state
        self._attachment: Attachment | None = None
        self._reference: _Reference | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the average with the policy, or restore it."""
        trainer, [checkpoint] = calling_trainer(self, *TRAIN_ARGUMENTS, state=state)
        _refuse(trainer)
        if self._attachment is not None:
            self._attachment.remove()
        policy = unwrap(kwargs["model"])
        if self._reference is None:
            self._reference = _reference_of(trainer, policy)
        stored = None if checkpoint is None else Path(checkpoint, REFERENCE_FILE)
        joins = stored is not None and not stored.is_file()
        if joins and self._on_missing_state == "refuse":
            raise ValueError(
                f"{stored} is missing: this checkpoint was saved without the callback. Resume from another one, or "
                "start a new average there with MovingReferenceCallback(..., on_missing_state='restart')."
            )
        rules = {_NAME: self._rule or default_rule()}
        step = state.global_step if joins else 0
        self.averager = Averager(policy, rules, step=step, total_steps=state.max_steps, **self._options)
        if stored is not None and not joins:
            self.averager.load(stored)
        elif not joins:
            self._reference.require_same(policy)
        self._move()
        self._attachment = self.averager.attach(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the reference."""
        if state.global_step % self._sync_every == 0:
            self._move()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the checkpoint."""
        if self.averager is not None and args.should_save and not args.save_only_model:
            folder = Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            self.averager.save(folder / REFERENCE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer; the reference stays where it is."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        if self.averager is not None:
            self.averager.wait()

    def _move(self) -> None:
        averager, reference = self.averager, self._reference
        if averager is not None and reference is not None and averager.updates():
            reference.put(averager.named_averages())


class _Reference:
    """Where the reference's weights are, by the names of the policy's trainable parameters."""

    def __init__(self, weights: dict[str, Tensor], whole: bool) -> None:
        self._weights, self._whole = weights, whole

    @torch.no_grad()
    def put(self, averages: Iterator[tuple[str, Tensor]]) -> None:
        """Give the reference these weights."""
        for name, value in averages:
            self._weights[name].copy_(value)

    def require_same(self, policy: nn.Module) -> None:
        """Refuse a reference that differs from the policy with which its average begins.

        Raises:
            ValueError: naming the first parameter that differs.
        """
        for name, parameter in policy.named_parameters():
            own = self._weights.get(name)
            if own is not None and self._whole and not torch.equal(own, parameter.detach().to(own.dtype)):
                raise ValueError(
                    f"the trainer's ref_model differs from the policy ({name}), and a moving reference is an average "
                    "of the policy from its start on. Leave ref_model out, or keep it fixed without this callback."
                )


def _refuse(trainer: Trainer) -> None:
    args: Any = trainer.args
    if getattr(args, "sync_ref_model", False):
        raise ValueError("sync_ref_model=True moves the reference too; leave it out beside MovingReferenceCallback.")
    for flag in ("precompute_ref_log_probs", "reference_free"):
        if getattr(args, flag, False):
            raise ValueError(f"{flag}=True leaves no reference to move during training; set it to False.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            "MovingReferenceCallback does not support FSDP or DeepSpeed: a reference that moves would be sharded apart "
            "from the policy. Train on one device or under DDP, or use TRL's sync_ref_model."
        )


def _reference_of(trainer: Trainer, policy: nn.Module) -> _Reference:
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    ref_model = getattr(trainer, "ref_model", None)
    if ref_model is not None:
        weights = {name: p.detach() for name, p in unwrap(ref_model).named_parameters()}
        if unknown := sorted(trained.keys() - weights.keys()):
            raise ValueError(f"the trainer's ref_model has no parameter {unknown[0]!r}; it must be the policy's model.")
        return _Reference(weights, whole=True)
    adapters: Any = getattr(policy, "peft_config", None)
    if adapters is None:
        beta = getattr(trainer, "beta", None)
        raise ValueError(
            f"{type(trainer).__name__} has no reference to move (beta={beta}). Give beta > 0, or leave "
            "MovingReferenceCallback out."
        )
    if "ref" in adapters:  # TRL's copy of an adapter that trains on
        active = str(policy.active_adapter)
        weights = dict(policy.named_parameters())
        names = {name: ".".join("ref" if part == active else part for part in name.split(".")) for name in trained}
        if missing := [name for name, other in names.items() if other not in weights or other == name]:
            raise ValueError(
                f"parameter {missing[0]!r} trains, and the adapter ref has no copy of it, so that the reference would "
                "move with it at once. Freeze it, or train it as part of the adapter (modules_to_save)."
            )
        return _Reference({name: weights[other].detach() for name, other in names.items()}, whole=False)
    copies = {name: p.detach().clone() for name, p in trained.items()}
    _replace_disabling(policy, copies)
    return _Reference(copies, whole=False)


def _replace_disabling(policy: nn.Module, copies: dict[str, Tensor]) -> None:
    """Have ``policy.disable_adapter()`` put the reference's parameters in place of the policy's.

    The parameters are exchanged, and not overwritten: a graph that still needs the policy's keeps them.
    """
    owners = {name: (policy.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in copies}
    stand_ins = {name: nn.Parameter(copy, requires_grad=False) for name, copy in copies.items()}

    @contextmanager
    def averaged_adapter() -> Iterator[None]:
        held = {name: owner._parameters[key] for name, (owner, key) in owners.items()}
        for name, (owner, key) in owners.items():
            owner._parameters[key] = stand_ins[name]
        try:
            yield
        finally:
            for name, (owner, key) in owners.items():
                owner._parameters[key] = held[name]

    policy.disable_adapter = averaged_adapter  # type: ignore[method-assign, assignment]
