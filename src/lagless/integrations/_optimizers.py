"""Optimizers that keep an average, or show other weights for evaluation than they train, inside trainers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from lagless.execution import local
from lagless.optim import AveragedOptimizer


def averaged_optimizer(optimizer: Any) -> AveragedOptimizer | None:
    """Return the optimizer that keeps an average, looked for inside what a trainer has wrapped around it."""
    found = _switching(optimizer)
    return found if isinstance(found, AveragedOptimizer) else None


@contextmanager
def training_weights(optimizer: Any) -> Iterator[None]:
    """Have the parameters hold what the optimizer trains inside the block, and afterwards what they held before.

    Inside, whoever asks the optimizer to switch (as the Trainer's evaluation does) is not heard: the average of
    somebody else may be in the parameters.
    """
    found = _switching(optimizer)
    if found is None:
        yield
        return
    parameters = [local(p) for group in found.param_groups for p in group["params"]]
    shown = [p.clone() for p in parameters]
    found.train()
    switched = not all(torch.equal(p, before) for p, before in zip(parameters, shown, strict=True))
    found.train = found.eval = lambda *_: found
    try:
        yield
    finally:
        del found.train, found.eval
        if switched:
            found.eval()
            with torch.no_grad():  # others compute what they show from what they train with rounding, at every switch
                for p, before in zip(parameters, shown, strict=True):
                    p.copy_(before)


def _switching(optimizer: Any) -> Any:
    """Return the optimizer with an evaluation mode of its own; Accelerate's wrappers only pass the call on."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer) and hasattr(optimizer, "accelerator_state"):
        optimizer = optimizer.optimizer
    modes = all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
    return optimizer if modes else None
