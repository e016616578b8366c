"""The diagonal preconditioner that an optimizer of torch keeps: D in its step η m/D, read from its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adagrad, Adam, Optimizer, RMSprop

from lagless.execution import foreach_add_, foreach_addcmul, foreach_div_, foreach_mul_, foreach_sqrt

Tensors = list[Tensor]


class Denominator(NamedTuple):
    """How D follows from an optimizer's state.

    Attributes:
        names: of the state's tensors that it takes, from a parameter group.
        compute: from these tensors for many parameters, one list per name, the group and the step to new tensors D.
        needs_step: whether D depends on the step; elsewhere it may be any number.
    """

    names: Callable[[dict[str, Any]], tuple[str, ...]]
    compute: Callable[[list[Tensors], dict[str, Any], float], Tensors]
    needs_step: bool


def denominator_of(optimizer: Optimizer) -> Denominator | None:
    """D of ``optimizer``, or None if it has no diagonal preconditioner that is known here."""
    return next((d for kind, d in _KNOWN.items() if isinstance(optimizer, kind)), None)


def is_plain(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` is known to have no diagonal preconditioner."""
    plain = [getattr(torch.optim, name, None) for name in ("SGD", "Muon")]  # older releases have no Muon
    return isinstance(optimizer, tuple(kind for kind in plain if kind is not None))


def _adam_names(group: dict[str, Any]) -> tuple[str, ...]:
    return ("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq",)


def _adam(columns: list[Tensors], group: dict[str, Any], step: float) -> Tensors:
    """(v/(1 - β₂^t))^½ + ε, in the operations of torch."""
    denominator = list(foreach_sqrt(columns[0]))
    foreach_div_(denominator, (1.0 - group["betas"][1] ** step) ** 0.5)
    foreach_add_(denominator, group["eps"])
    return denominator


def _rmsprop_names(group: dict[str, Any]) -> tuple[str, ...]:
    return ("square_avg", "grad_avg") if group["centered"] else ("square_avg",)


def _rmsprop(columns: list[Tensors], group: dict[str, Any], step: float) -> Tensors:
    """v^½ + ε, or (v - ḡ²)^½ + ε where gradients are centered."""
    del step
    square, *mean = columns
    if mean:
        square = foreach_addcmul(square, mean[0], mean[0], -1.0)
    denominator = list(foreach_sqrt(square))
    foreach_add_(denominator, group["eps"])
    return denominator


def _adagrad_names(group: dict[str, Any]) -> tuple[str, ...]:
    del group
    return ("sum",)


def _adagrad(columns: list[Tensors], group: dict[str, Any], step: float) -> Tensors:
    """((Σ g²)^½ + ε)(1 + (t - 1)·lr_decay): the learning rate that falls is part of D."""
    denominator = list(foreach_sqrt(columns[0]))
    foreach_add_(denominator, group["eps"])
    if group["lr_decay"] != 0.0:
        foreach_mul_(denominator, 1.0 + (step - 1.0) * group["lr_decay"])
    return denominator


_KNOWN: dict[type[Optimizer], Denominator] = {
    Adam: Denominator(_adam_names, _adam, needs_step=True),  # AdamW is one
    RMSprop: Denominator(_rmsprop_names, _rmsprop, needs_step=False),
    Adagrad: Denominator(_adagrad_names, _adagrad, needs_step=True),
}
