"""What weights are learned on: the checkpoints of a run, or models of several runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lagless.checkpoints import Checkpoint, CheckpointError, Models, StrPath, Trajectory, find_checkpoints
from lagless.lab.averages import load_model
from lagless.lab.learn._baselines import decays_compared, default_prior, learned_shape, rules_compared
from lagless.lab.learn._modes import MODES, Floats, Mode
from lagless.rules import Rule, rule_to_dict, trajectory_weights

_LEAST_CHECKPOINTS = 3


@dataclass(frozen=True)
class Source:
    """Checkpoints, and what is known of them before anything is measured.

    Attributes:
        checkpoints: N of them.
        names: of each.
        steps: of each; None for models of several runs.
        prior: the weights to start from, shape (N,).
        rules: other weights by role and name.
        decays: from learned weights, those of decays of the same shape, by name; None where there is no schedule.
        modes: those that make sense.
        identity: what the results depend on beside the checkpoints.
    """

    checkpoints: tuple[Checkpoint, ...]
    names: tuple[str, ...]
    steps: tuple[int, ...] | None
    prior: Floats
    rules: Mapping[str, Mapping[str, Floats]]
    decays: Callable[[Floats], Mapping[str, Floats]] | None
    modes: tuple[Mode, ...]
    identity: Mapping[str, Any]

    @property
    def runs(self) -> list[Path]:
        """The folders that may hold the recipe of a run."""
        places = [place for c in self.checkpoints for place in (c.path.parent, c.path)]
        return list(dict.fromkeys(place for place in places if place.is_dir()))


def source_of(run: StrPath | Sequence[StrPath] | Trajectory | Models, prior: Rule | None) -> Source:
    """Open what weights are to be learned on.

    Raises:
        CheckpointError: if checkpoints are missing, damaged or do not belong together.
        ValueError: if there are too few, or a rule is the prior of models of several runs.
    """
    if isinstance(run, Models):
        count = len(run.checkpoints)
        if prior is not None:
            raise ValueError(f"prior={prior}: models of several runs have no order for a rule to go by; leave it out.")
        modes: tuple[Mode, ...] = ("free", "convex")
        return Source(run.checkpoints, run.names, None, np.full(count, 1.0 / count), {}, None, modes, {})
    trajectory = run if isinstance(run, Trajectory) else find_checkpoints(run)
    steps = trajectory.steps
    if len(steps) < _LEAST_CHECKPOINTS:
        raise ValueError(
            f"run: {len(steps)} checkpoints (steps {', '.join(map(str, steps))}); weights are learned on "
            f"{_LEAST_CHECKPOINTS} or more. Keep more of them while training (save_steps, save_total_limit)."
        )
    rule = prior or default_prior(steps)
    compared = {"best rule": rules_compared(steps), "best decay": decays_compared(steps)}
    return Source(
        trajectory.checkpoints,
        tuple(checkpoint.path.name for checkpoint in trajectory.checkpoints),
        steps,
        trajectory_weights(rule, steps),
        {role: _weights(rules, steps) for role, rules in compared.items()},
        lambda weights: _weights(learned_shape(weights, steps), steps),
        MODES,
        {"prior": rule_to_dict(rule), "steps": list(steps)},
    )


def _weights(rules: Mapping[str, Rule], steps: Sequence[int]) -> dict[str, Floats]:
    return {name: trajectory_weights(rule, steps) for name, rule in rules.items()}


def model_and_tensors(
    source: Source, model: nn.Module | None, device: str | torch.device | None
) -> tuple[nn.Module, Mapping[str, Tensor] | None]:
    """Return the model that sums are loaded into, and its tensors by their names in the checkpoints.

    An adapter's sums are loaded into the adapter, of which alone gradients are taken; the tensors are None where they
    are the model's state dict.

    Raises:
        CheckpointError: if the checkpoints are adapters, but not the model.
    """
    last = source.checkpoints[-1]
    if not last.is_adapter:
        return load_model(last, device) if model is None else model.eval(), None
    try:
        from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ImportError("weights on adapters need PEFT: pip install peft") from error
    if model is None:
        model = AutoPeftModelForCausalLM.from_pretrained(last.path, is_trainable=True, dtype=torch.float32)
        model.to(torch.device(device or torch.accelerator.current_accelerator() or "cpu"))  # type: ignore[arg-type]
    if not isinstance(model, PeftModel):
        raise CheckpointError(
            f"{last.path} is an adapter, but the model is a {type(model).__name__}. Give a PeftModel with that "
            "adapter, or leave the model out."
        )
    return model.eval(), get_peft_model_state_dict(model, save_embedding_layers=False)
