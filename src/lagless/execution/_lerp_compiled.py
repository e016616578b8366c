"""One kernel for the updates of several averages: live weights read once, each average read and written once.

Blocks kept in cache come close to that; a compiled kernel reaches it, for the price of compiling once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

KERNEL_SMALLEST = 1 << 16  # elements: below this, calling a compiled kernel costs more than it saves


def lerp_compiled(live: Tensor, averages: Sequence[Tensor], gains: Tensor) -> None:
    """``b_k ← b_k + gains_k (live - b_k)`` for every k, in one pass.

    Args:
        live: shape (n,), any floating dtype.
        averages: k tensors of shape (n,), modified in place.
        gains: shape (k,), on the same device; a tensor, so that new values need no new kernel.
    """
    _kernel(len(averages))(live, list(averages), gains)


@cache
def _kernel(count: int) -> Callable[[Tensor, list[Tensor], Tensor], None]:
    def kernel(live: Tensor, averages: list[Tensor], gains: Tensor) -> None:
        for k in range(count):
            averages[k].lerp_(live.to(averages[k].dtype), gains[k].to(averages[k].dtype))

    return torch.compile(kernel, dynamic=True, fullgraph=True)
