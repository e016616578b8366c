"""Running elementwise formulas over a parameter in pieces, and writing the result into it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lagless.execution import split

_PIECE = 1 << 16  # elements: the dozen temporaries of a formula stay in a core's cache


def pieces(*tensors: Tensor, whole: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """Matching views of tensors of one shape: small ones on CPUs, where all are contiguous, or the tensors as given."""
    if whole or tensors[0].device.type != "cpu" or not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    yield from zip(*(split(t.view(-1), _PIECE) for t in tensors), strict=True)


def move(parameter: Tensor, update: Tensor, lr: float | Tensor, weight_decay: float) -> None:
    """θ ← (1 - lr·λ)θ - lr·u in the update's precision."""
    if parameter.dtype == update.dtype and not isinstance(lr, Tensor):
        parameter.mul_(1.0 - lr * weight_decay).add_(update, alpha=-lr)
    else:
        parameter.copy_(parameter.to(update.dtype) * (1.0 - lr * weight_decay) - lr * update)
