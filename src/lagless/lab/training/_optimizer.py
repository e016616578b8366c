"""The optimizer and its learning rate over time."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lagless.lab.recipes import (
    AdamW,
    AnySchedule,
    Constant,
    Cosine,
    OptimizerSection,
    OwnOptimizer,
    Power,
    PrimalAveraging,
    Recipe,
    WarmupStableDecay,
)
from lagless.optim import BiasCorrectedSophia


def build_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """The optimizer of the recipe over the trainable parameters of the model, with their names.

    Raises:
        ImportError: if it is in a package that is not installed.
    """
    section, training = recipe.method.optimizer, recipe.training
    groups = _groups(model, training.embedding_learning_rate)
    if isinstance(section, PrimalAveraging):
        return section.make(groups, training.learning_rate)
    optimizer = _class(section)(groups, lr=training.learning_rate, **section.settings())
    if isinstance(optimizer, BiasCorrectedSophia):
        optimizer.estimate_curvature(model)
    return optimizer


def _class(section: OptimizerSection) -> Callable[..., Optimizer]:
    if isinstance(section, OwnOptimizer):
        return section.make
    if isinstance(section, AdamW):
        return torch.optim.AdamW
    try:
        return importlib.import_module("schedulefree").AdamWScheduleFree
    except ModuleNotFoundError as error:
        raise ImportError("method.optimizer.kind=schedule_free needs a package: pip install schedulefree") from error


def _groups(model: nn.Module, embedding_learning_rate: float | None) -> list[dict[str, Any]]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if embedding_learning_rate is None:
        return [{"params": named}]
    embeddings = {id(p) for p in _embeddings(model)}
    return [
        {"params": [(name, p) for name, p in named if id(p) not in embeddings]},
        {"params": [(name, p) for name, p in named if id(p) in embeddings], "lr": embedding_learning_rate},
    ]


def _embeddings(model: Any) -> Iterator[nn.Parameter]:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            yield module.weight


def schedule_factor(schedule: AnySchedule, steps: int) -> Callable[[int], float]:
    """What the peak learning rate is multiplied by, as a function of the number of steps made.

    Args:
        schedule: the section of a recipe.
        steps: T, the length of the run.

    >>> from lagless.lab.recipes import WarmupStableDecay
    >>> factor = schedule_factor(WarmupStableDecay(kind="wsd", warmup_steps=2, decay=0.5), 8)
    >>> [factor(done) for done in range(8)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def decay(done: int) -> float:
        match schedule:
            case Constant():
                return 1.0
            case Power():
                return (2.0 + done) ** -schedule.exponent
            case WarmupStableDecay():
                start = max(schedule.warmup_steps, steps - round(schedule.decay * steps))
            case _:
                start = schedule.warmup_steps
        gone = min(max(0.0, (done - start) / max(1, steps - start)), 1.0)
        shape = (1.0 + math.cos(math.pi * gone)) / 2.0 if isinstance(schedule, Cosine) else 1.0 - gone
        return schedule.floor + (1.0 - schedule.floor) * shape

    def factor(done: int) -> float:
        warmup = min(1.0, (done + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
        return warmup * decay(done)

    return factor
