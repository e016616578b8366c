"""Microbatches weighed by their supervised tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lagless.execution import sum_over_mesh


class Weighed(Protocol):
    """Who has parameter groups and wants to know what microbatches weigh."""

    param_groups: list[dict[str, Any]]


def weigh_by_tokens(
    optimizer: Weighed, announce: Callable[[Any, float], None], model: nn.Module, shifted: bool
) -> RemovableHandle:
    """Announce the number of supervised tokens whenever ``model`` is called with ``num_items_in_batch``.

    Args:
        optimizer: one, or who watches its gradients; is not kept alive.
        announce: is called with the optimizer and the number.
        model: called with ``labels``; those of one dimension are of whole samples, and no tokens.
        shifted: whether labels are shifted by one position in the loss.
    """
    owner = weakref.ref(optimizer)

    def weigh(module: nn.Module, _: Any, arguments: dict[str, Any]) -> None:
        alive, labels = owner(), arguments.get("labels")
        if alive is None or labels is None or labels.dim() < 2 or not (module.training and torch.is_grad_enabled()):
            return
        if arguments.get("num_items_in_batch") is not None:
            tokens = (labels[..., 1:] if shifted else labels).ne(-100).sum()
            announce(alive, _over_shards(alive, tokens))

    return model.register_forward_pre_hook(weigh, with_kwargs=True)


def _over_shards(optimizer: Weighed, count: Tensor) -> float:
    """A count over all processes that share sharded parameters, whose microbatches are one."""
    sharded = next((p for g in optimizer.param_groups for p in g["params"] if isinstance(p, DTensor)), None)
    if sharded is not None:
        count = sum_over_mesh(count, sharded)
    return float(count)
