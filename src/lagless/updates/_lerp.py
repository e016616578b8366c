"""Moving averages by one step, without losing either end: exact at gains of 0 and 1, and finite where the mean is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lerp(start: Tensor, end: Tensor, gain: Any) -> Tensor:
    """Return ``start + gain·(end - start)``; ``start`` itself at gain 0 and ``end`` itself at gain 1, bit for bit.

    From gain 1/2 on it is computed from the other end, as ``torch.lerp`` does: a small ``end`` would otherwise be lost
    in the rounding of a large ``start``.

    Args:
        start: where the average is.
        end: what it moves to.
        gain: in [0, 1]; a number, or a tensor that broadcasts.
    """
    difference = end - start
    if isinstance(gain, Tensor):
        moved = torch.where(gain < 0.5, start + gain * difference, end - (1.0 - gain) * difference)
        return torch.where(gain == 0.0, start, torch.where(gain == 1.0, end, moved))
    if gain in (0.0, 1.0):
        return end if gain else start
    if gain < 0.5:
        return start + gain * difference
    rest = 1.0 - torch.tensor(gain, dtype=difference.dtype)  # of the gain as it is rounded to the tensors' type
    return end - rest.item() * difference


def lerp_square(start: Tensor, root: Tensor, gain: Any) -> Tensor:
    """Return :func:`lerp` of ``start`` towards root², or ``(1 - gain)·start + gain·root·root`` where that overflows.

    A square that overflows before it is multiplied by a small gain makes an average infinite whose value is not, and
    the difference of two infinities is NaN, for good.

    Args:
        start: where the average of squares is, ≥ 0.
        root: what it takes in the square of.
        gain: in [0, 1]; a number, or a tensor that broadcasts.
    """
    moved = lerp(start, root * root, gain)
    return torch.where(moved.isfinite(), moved, (1.0 - gain) * start + gain * root * root)
