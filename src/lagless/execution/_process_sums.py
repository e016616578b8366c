"""Sums of tensors over processes and over the shards of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lagless.execution._annotated import all_reduce, split, start_all_reduce
from lagless.execution._foreach import foreach_copy_
from lagless.execution._sharding import Sharding

BUCKET = 32 * 2**20  # bytes: a copy that is small beside a model, and large enough that latency does not count


def sum_in_place(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """Return a function that replaces a tensor by its sum over ``group`` and returns it."""

    def total(tensor: Tensor) -> Tensor:
        all_reduce(tensor, group)
        return tensor

    return total


def sum_over(group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over the processes, in as few messages as a bounded copy of them allows.

    Tensors of one dtype and device are put together in buckets of at most 32 MiB; larger ones go as they are.
    """
    works: list[tuple[dist.Work | None, list[Tensor], Tensor]] = []
    for bucket in _buckets(tensors):
        message = bucket[0] if len(bucket) == 1 else torch.cat([t.reshape(-1) for t in bucket])
        works.append((start_all_reduce(message, group), bucket, message))
    for work, bucket, message in works:
        if work is not None:
            work.wait()
        if len(bucket) > 1:
            parts = split(message, [t.numel() for t in bucket])
            foreach_copy_(bucket, [part.view(t.shape) for part, t in zip(parts, bucket, strict=True)])


def over_shards(value: Tensor, tensor: Tensor) -> Tensor:
    """The sum of ``value`` over the ranks that hold different parts of ``tensor``; itself where it is whole."""
    sharding = Sharding.of(tensor)
    if sharding.mesh is None:
        return value
    value = value.clone()
    for dimension, placement in enumerate(sharding.placements):
        if not placement.is_replicate():
            all_reduce(value, sharding.mesh.get_group(dimension))
    return value


def sum_over_mesh(value: Tensor, sharded: DTensor) -> Tensor:
    """The sum over all processes of a sharded tensor's mesh."""
    value, mesh = value.to(sharded.device, copy=True), sharded.device_mesh
    for dimension in range(mesh.ndim):
        all_reduce(value, mesh.get_group(dimension))
    return value


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of tensors to send together, in an order that depends on their shapes alone."""
    filling: dict[Any, list[Tensor]] = {}
    for t in tensors:
        kind = t.dtype, t.device
        bucket = filling.setdefault(kind, [])
        if bucket and (sum(b.numel() for b in bucket) + t.numel()) * t.element_size() > BUCKET:
            yield filling.pop(kind)
            bucket = filling.setdefault(kind, [])
        bucket.append(t)
    yield from filling.values()
