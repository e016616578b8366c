"""Gradients looked at as a whole: their norms, whether a step can take them, and whether all numbers are finite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lagless.execution import Sharding, exact_dtype, foreach_max, foreach_norm, local, over_shards, sum_over_mesh

_PIECE = 2**20  # elements whose squares float32 adds up without losing digits


def check_gradients(name: str, parameters: Sequence[Tensor]) -> None:
    """Refuse gradients that no step can take.

    Args:
        name: of the optimizer.
        parameters: with gradients.

    Raises:
        RuntimeError: for sparse gradients, and for those that do not lie on the ranks as their parameters do.
    """
    for p in parameters:
        gradient: Any = p.grad
        if gradient.is_sparse:
            raise RuntimeError(f"{name}: sparse gradients; use dense ones, e.g. sparse=False in Embedding.")
        if isinstance(p, DTensor) and gradient.placements != p.placements:
            raise RuntimeError(
                f"{name}: a parameter {tuple(p.shape)} lies on the ranks as {p.placements}, its gradient as "
                f"{gradient.placements}, as of weights within SequenceParallel. Shard them with fully_shard, which "
                "reduces gradients."
            )


def all_finite(parameters: Sequence[Tensor], sums: Iterable[dict[Any, Tensor]]) -> bool:
    """Return whether the gradients of ``parameters`` and sums over microbatches are finite, on all ranks."""
    if not parameters:
        return True
    finite = torch.stack([n.float() for n in norms(parameters)]).isfinite().all()
    # Sums of powers may overflow where gradients do not, those of even ones upwards (off-diagonal elements of a
    # Gram matrix not before diagonal ones); NaN is the largest of all. Of fourth powers the Euclidean norm is
    # infinite before they are.
    filled = [(key.exponent % 2, t) for totals in sums for key, t in totals.items() if t.numel()]
    even, odd = ([t for rest, t in filled if rest == parity] for parity in (0, 1))
    extremes = [*(foreach_max(even) if even else ()), *(t for each in odd for t in torch.aminmax(each))]
    if extremes:
        wide = max((t.dtype for t in extremes), key=lambda d: d.itemsize)
        finite &= torch.stack([t.to(wide) for t in extremes]).isfinite().all()
    sharded = next((p for p in parameters if isinstance(p, DTensor)), None)
    if sharded is not None:
        return not bool(sum_over_mesh((~finite).float(), sharded))
    return bool(finite)  # the step's one wait for the device


def norms(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return ‖p.grad‖ of each that has one, in float32 or wider; of this rank's part."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if not gradients:
        return []
    dtype = max((torch.promote_types(g.dtype, torch.float32) for g in gradients), key=lambda d: d.itemsize)
    if all(map(_sums_by_dot, gradients)):
        return [squared_norm(g).sqrt_().to(dtype) for g in gradients]
    return list(foreach_norm(gradients, 2, dtype=dtype))


def squared_norm(gradient: Tensor) -> Tensor:
    """Return the sum of squares of a tensor as one number, in float64 where the device has it.

    Norms of torch lose digits on CPUs where there are more elements than a few million: one accumulator takes in all.
    """
    if not _sums_by_dot(gradient):
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return torch.linalg.vector_norm(gradient, dtype=wide).to(exact_dtype(gradient.device)).square()
    flat = gradient.detach().view(-1)
    if flat.numel() <= _PIECE:
        return torch.dot(flat, flat).double()
    return torch.stack([torch.dot(part, part) for part in flat.split(_PIECE)]).sum(dtype=torch.float64)


def _sums_by_dot(tensor: Tensor) -> bool:
    fits = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
    return fits and tensor.is_contiguous()


def norms_of_whole(parameters: Sequence[Tensor], norms: Tensor) -> Tensor:
    """Return norms of whole gradients, from those of this rank's parts; shape (..., number of parameters)."""
    if not any(isinstance(p, DTensor) for p in parameters):
        return norms
    return sums_of_whole(parameters, norms.double().square()).sqrt().to(norms.dtype)


def sums_of_whole(parameters: Sequence[Tensor], sums: Tensor) -> Tensor:
    """Return sums over whole gradients, from those over this rank's parts; shape (..., number of parameters)."""
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for i, p in enumerate(parameters):
        sharding = Sharding.of(p)
        if sharding.mesh is not None:
            alike[sharding.mesh, tuple(each.is_replicate() for each in sharding.placements)].append(i)
    for some in alike.values():
        sums[..., some] = over_shards(sums[..., some], parameters[some[0]])
    return sums
