"""How tensors lie on the ranks: a rule acts on each element alone, so the part on this rank is all it needs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lagless.execution._ranks import Ranks


@dataclass(frozen=True)
class Sharding:
    """How one tensor lies on the ranks. Of a plain tensor, the part on this rank is all of it.

    Attributes:
        shape: of the whole tensor.
        mesh: the ranks that share a DTensor; None for a plain tensor.
        placements: what is cut along which of their dimensions.
        stride: of the whole tensor.
    """

    shape: torch.Size
    mesh: Any = None
    placements: tuple[Any, ...] = ()
    stride: tuple[int, ...] = field(default=(), compare=False)

    @staticmethod
    def of(tensor: Tensor) -> Sharding:
        """The sharding of ``tensor``."""
        if not is_sharded(tensor):
            return Sharding(tensor.shape)
        dtensor: Any = tensor
        return Sharding(tensor.shape, dtensor.device_mesh, dtensor.placements, tensor.stride())

    def __str__(self) -> str:
        where = "" if self.mesh is None else f" as {', '.join(map(str, self.placements))} on {self.mesh}"
        return f"{tuple(self.shape)}{where}"

    @property
    def box(self) -> tuple[slice, ...]:
        """Where this rank's part lies in the whole, per dimension."""
        if self.mesh is None:
            return tuple(slice(0, size) for size in self.shape)
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(self.shape, self.mesh, self.placements)
        return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))

    def present(self, part: Tensor) -> Tensor:
        """The tensor of which ``part`` is this rank's, sharing its memory."""
        if self.mesh is None:
            return part
        # Not DTensor.from_local: it would move an offloaded part to the device of the mesh.
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        meta = TensorMeta(self.shape, self.stride, part.dtype)
        return DTensor(part, DTensorSpec(self.mesh, self.placements, tensor_meta=meta), requires_grad=False)

    def part_of(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that is whole, or sharded in this same way; no copy.

        Raises:
            ValueError: if it is sharded in another way.
        """
        if not is_sharded(tensor):
            return tensor if self.mesh is None else tensor[self.box]
        if Sharding.of(tensor) != self:
            raise ValueError(
                f"the tensor is {Sharding.of(tensor)}, the parameter is {self}. torch.distributed.checkpoint reshards "
                "while it loads, and so does Averager.load."
            )
        return local(tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` on this rank, sharing its memory, outside of autograd."""
    part: Any = tensor
    part = part.to_local() if is_sharded(tensor) else part  # before detach(), which is slower on a DTensor
    return part.detach() if part.requires_grad else part


def ranks_of(tensors: Iterable[Tensor]) -> Ranks:
    """The ranks that gather ``tensors`` together; this one alone if none is sharded."""
    return Ranks.of_the_run() if any(map(is_sharded, tensors)) else Ranks()


def gather(tensor: Tensor) -> Tensor:
    """The whole of ``tensor``, in the memory of every rank; all ranks call this together."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    sharding = Sharding.of(tensor)
    # from_local moves an offloaded part to the device on which the mesh communicates.
    whole: Any = DTensor.from_local(
        local(tensor), sharding.mesh, sharding.placements, shape=sharding.shape, stride=sharding.stride
    )
    return whole.full_tensor()


def fsdp_modules(module: nn.Module) -> list[Any]:
    """The modules in ``module`` whose parameters ``fully_shard`` gathers and frees together."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]
