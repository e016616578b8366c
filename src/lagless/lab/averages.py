"""Averages of a run's checkpoints evaluated in memory: many settings, one read of the files, no model written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lagless.checkpoints import Checkpoint, CheckpointError, StrPath, Trajectory, find_checkpoints
from lagless.posthoc import Progress, combine_checkpoints
from lagless.rules import Rule, trajectory_weights

LIVE = "live"

State = dict[str, Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Evaluated(Generic[Result]):
    """What was found of one average.

    Attributes:
        name: of the rule; ``"live"`` for the weights as trained.
        step: as of which step it was formed.
        weights: on every checkpoint.
        result: what ``evaluate`` returned.
    """

    name: str
    step: int
    weights: tuple[float, ...]
    result: Result


def evaluate_averages(
    run: StrPath | Sequence[StrPath] | Trajectory,
    rules: Mapping[str, Rule],
    evaluate: Callable[[nn.Module], Result],
    *,
    at: Sequence[int] | None = None,
    live: bool = True,
    model: nn.Module | None = None,
    memory: int = 2**33,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Iterator[Evaluated[Result]]:
    """Evaluate averages of stored checkpoints one after another in one model, as many as there are rules and steps.

    Where the checkpoints or the averages fit in ``memory``, every file is read once; else once per group of averages
    that fits.

    Args:
        run: a run folder, a list of checkpoints, or what :func:`lagless.posthoc.find_checkpoints` found.
        rules: by name.
        evaluate: called with the model, in evaluation mode, holding an average in float32.
        at: the steps as of which to average; by default the last one.
        live: evaluate the checkpoints at those steps, too, first.
        model: what to load averages into; by default the last checkpoint, as ``transformers`` loads it.
        memory: bytes for checkpoints or averages.
        device: where to evaluate; by default an accelerator if there is one.
        progress: called with the bytes read so far and in all.

    Yields:
        The results in the order of steps, then of rules.

    Raises:
        CheckpointError: if checkpoints are missing or damaged, are adapters, or do not fit the model.
        ValueError: if ``at`` is no step of the run, or a rule makes no update by then.
    """
    trajectory = run if isinstance(run, Trajectory) else find_checkpoints(run)
    settings = list(_settings(trajectory, rules, at, live))
    if not settings:
        raise ValueError("rules: the mapping is empty; give at least one rule, or live=True.")
    held = load_model(trajectory.checkpoints[-1], device) if model is None else model.eval()
    states = _averages(trajectory, np.array([weights for _, _, weights in settings]), memory, progress)
    for (name, step, weights), state in zip(settings, states, strict=True):
        load_weights(held, state)
        yield Evaluated(name, step, tuple(weights), evaluate(held))


def load_model(
    last: Checkpoint, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A checkpoint as ``transformers`` loads it, for :func:`load_weights` to fill.

    Raises:
        CheckpointError: for adapters.
    """
    from transformers import AutoModelForCausalLM

    if last.is_adapter:
        raise CheckpointError(
            f"{last.path} is an adapter; only whole models are evaluated in memory. Write averages of adapters with "
            "lagless average, and evaluate those."
        )
    model = AutoModelForCausalLM.from_pretrained(last.path, dtype=dtype)
    model.eval().to(torch.device(device or torch.accelerator.current_accelerator() or "cpu"))  # type: ignore[arg-type]
    return model


def load_weights(model: nn.Module, state: State) -> None:
    """Copy the tensors of a checkpoint into a model.

    Raises:
        CheckpointError: if the model has a tensor that the checkpoint lacks, or the other way round.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    own = model.state_dict()
    given = {own[name].data_ptr() for name in state if name in own}
    missing = [name for name in missing if own[name].data_ptr() not in given]  # tied tensors are stored once
    if missing or unexpected:
        raise CheckpointError(
            f"the checkpoints do not fit the model: {(missing or unexpected)[0]!r} is only in the "
            f"{'model' if missing else 'checkpoints'}. Write averages with lagless average, and evaluate those."
        )


def weighted_sum(states: Sequence[State], weights: NDArray[np.float64]) -> State:
    """Σ_i weights[i] states[i]; tensors that are not floating-point are the last state's."""
    total = dict(states[-1])
    for name, last in total.items():
        if last.is_floating_point():
            sum_ = torch.zeros_like(last)
            for state, weight in zip(states, weights, strict=True):
                if weight != 0.0:
                    sum_.add_(state[name], alpha=float(weight))
            total[name] = sum_
    return total


def _settings(
    trajectory: Trajectory, rules: Mapping[str, Rule], at: Sequence[int] | None, live: bool
) -> Iterator[tuple[str, int, NDArray[np.float64]]]:
    steps = list(trajectory.steps)
    for step in steps[-1:] if at is None else at:
        if step not in steps:
            raise ValueError(f"at={step}: the run has checkpoints at {', '.join(map(str, steps))}.")
        if live:
            yield LIVE, step, np.eye(len(steps))[steps.index(step)]
        for name, rule in rules.items():
            yield name, step, trajectory_weights(rule, steps, at=step)


def _averages(
    trajectory: Trajectory, weights: NDArray[np.float64], memory: int, progress: Progress | None
) -> Iterator[State]:
    checkpoints = trajectory.checkpoints
    size = sum(info.numel * max(4, info.dtype.itemsize) for info in checkpoints[-1].tensors.values())
    fitting = max(1, memory // size)
    options: dict[str, Any] = {"progress": progress, "memory": min(memory, 2**30)}
    if len(checkpoints) <= fitting < len(weights):
        states = combine_checkpoints(checkpoints, np.eye(len(checkpoints)), **options)
        for row in weights:
            yield weighted_sum(states, row)
    else:
        for first in range(0, len(weights), fitting):
            group = combine_checkpoints(checkpoints, weights[first : first + fitting], **options)
            while group:
                yield group.pop(0)
