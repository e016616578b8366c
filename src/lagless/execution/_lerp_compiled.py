"""One kernel for the updates of several averages: live weights read once, each average read and written once.

Blocks kept in cache come close to that; a compiled kernel reaches it, for the price of compiling once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from types import FunctionType

from torch import Tensor

from lagless.execution._annotated import one_kernel
from lagless.execution._compiled import KERNEL_SMALLEST as KERNEL_SMALLEST, or_eager
from lagless.execution._low_bits import lerp_low_single_

_WIDTHS = (8, 4, 2, 1)
"""Averages per kernel: every number of them is made of few kernels, each compiled once, whichever rules are due."""


def lerp_compiled(
    live: Tensor, averages: Sequence[Tensor], gains: Tensor, low: Sequence[Tensor | None] | None = None
) -> None:
    """``b_k ← b_k + gains_k (live - b_k)`` for every k, in one pass; from the ninth on, in one more for each eight.

    Args:
        live: shape (n,), any floating dtype.
        averages: k tensors of shape (n,), modified in place.
        gains: shape (k,), on the same device; a tensor, so that new values need no new kernel.
        low: for each average, None or its low bits, which then move with it as in ``lerp_low_``.
    """
    places = range(len(averages))
    bits = [None] * len(averages) if low is None else low
    for kept in ([k for k in places if bits[k] is None], [k for k in places if bits[k] is not None]):
        begin = 0
        for width in _WIDTHS:
            while len(kept) - begin >= width:
                chosen = kept[begin : begin + width]
                own, lows = [averages[k] for k in chosen], [b for k in chosen if (b := bits[k]) is not None]
                kind = (live.dtype, live.device.type, *(t.dtype for t in own))
                _kernel(width, bool(lows), kind)(live, own, lows, [gains[k] for k in chosen])
                begin += width


@cache
def _kernel(width: int, compensated: bool, kind: Hashable) -> Callable[..., None]:
    def kernel(live: Tensor, averages: list[Tensor], low: list[Tensor], gains: list[Tensor]) -> None:
        for k in range(width):
            wide, gain = live.to(averages[k].dtype), gains[k].to(averages[k].dtype)
            if compensated:
                lerp_low_single_(averages[k], low[k], wide, gain)
            else:
                averages[k].lerp_(wide, gain)

    # torch counts recompilations by code object, and gives up at the ninth: every kind has one of its own.
    name = f"lerp_{width}_{abs(hash((compensated, kind)))}"
    own = FunctionType(kernel.__code__.replace(co_name=name), globals(), name, None, kernel.__closure__)
    return or_eager(one_kernel(own), own)
