"""Checks of what optimizers have in common with each other and with no rule: tensors, rules and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from lagless._validation import require_number
from lagless.rules import Rule, rule_line


def require_learning_rate(owner: object, lr: object) -> None:
    """Require a finite number ≥ 0, or a tensor of one; a tensor on an accelerator is not read."""
    name = f"{type(owner).__name__}: lr"
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.is_complex():
            raise ValueError(f"{name} has shape {tuple(lr.shape)}, {lr.dtype}; a learning rate is one real number.")
        if lr.device.type != "cpu":
            return
        lr = lr.item()
    require_number(name, lr, minimum=0.0, finite=True)


def check_average(average: object) -> None:
    """Require an averaging rule."""
    if not isinstance(average, Rule):
        raise TypeError(f"average={average!r} is not an averaging rule; write average={rule_line(average)}.")


def check_dtype(dtype: object) -> None:
    """Require a dtype in which averages are stored."""
    if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"average_dtype={dtype}; averages are stored as bfloat16, float32 or float64, or None.")
