"""Functions of torch that carry no annotations or unfinished ones, with whole ones: what calls them is checked."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook


def numbers(tensor: Tensor) -> list[float]:
    """Return the elements of a tensor of one dimension as Python floats; waits for its device."""
    return [float(x) for x in tensor.tolist()]


def split(tensor: Tensor, sizes: int | Sequence[int]) -> tuple[Tensor, ...]:
    """Return views of ``tensor`` along its first dimension, of one size or of the given ones."""
    return tuple(tensor.split(sizes))


def from_numpy(array: NDArray[Any]) -> Tensor:
    """Return a tensor on the memory of ``array``."""
    return torch.from_numpy(array)


def one_kernel(
    formula: Callable[..., None], options: dict[str, str | int | bool | Callable[..., Any]] | None = None
) -> Callable[..., None]:
    """Return ``formula`` to be compiled as a whole, at its first call, for tensors of every size."""
    return torch.compile(formula, dynamic=True, fullgraph=True, options=options)


def backward(loss: Tensor, retain_graph: bool) -> None:
    """Add the gradients of ``loss`` to those of its leaves."""
    loss.backward(retain_graph=retain_graph)


def watch_gradient(
    parameter: Tensor, before: Callable[[Tensor], None], after: Callable[[Tensor], None]
) -> list[RemovableHandle]:
    """Call ``before`` with each gradient of a leaf, and ``after`` with the leaf once it is accumulated."""
    return [
        parameter.register_hook(unserializable_hook(before)),
        parameter.register_post_accumulate_grad_hook(after),
    ]


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace ``tensor`` by its sum over the processes of ``group``."""
    dist.all_reduce(tensor, group=group)


def start_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> dist.Work | None:
    """Begin to replace ``tensor`` by its sum over the processes; return what to wait for, if there is anything."""
    return dist.all_reduce(tensor, group=group, async_op=True)


def all_gather_object(mine: object, count: int, group: dist.ProcessGroup | None) -> list[Any]:
    """Return what each of ``count`` processes gives, by rank."""
    found: list[Any] = [None] * count
    dist.all_gather_object(found, mine, group=group)
    return found
