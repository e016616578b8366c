"""What is kept of one parameter's microbatches, and whether its gradient is still what they have made it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from lagless.execution import local
from lagless.optim.bias_corrected._sums import Sums


class Track:
    """One parameter's buffers, and what its gradient was like after the latest backward pass."""

    def __init__(self, sums: Sums, keep: bool) -> None:
        self.sums, self.keep = sums, keep
        self.samples: dict[int, Tensor] = {}
        self.microbatch = 0  # the latest one that reached this parameter, 1-based; 0: none of this window
        self.reached = [0, 0]  # microbatches of either half that did
        self.norm: Tensor | None = None  # of p.grad after the latest backward
        self._left: tuple[TensorWeakRef, int, list[Any]] | None = None  # p.grad, its version and a few values then

    def leave(self, grad: Tensor, norm: Tensor | None) -> None:
        """Remember what ``p.grad`` is like at the end of a backward pass; ``norm`` is None if nobody measured it."""
        self.norm, self._left = norm, (TensorWeakRef(grad), local(grad)._version, _a_few(local(grad)))

    def is_as_left(self, grad: Tensor | None) -> bool:
        """Whether nobody seems to have written to ``p.grad`` since; False means that somebody may have."""
        if self._left is None or grad is None:
            return False
        tensor, version, values = self._left
        # What is written by way of p.grad.data changes no version.
        return tensor() is grad and local(grad)._version == version and _alike(_a_few(local(grad)), values)

    def has_changed(self, grad: Tensor | None, norm: Tensor | None) -> bool:
        """Whether the values of ``p.grad`` are others now that it has this norm."""
        if self._left is None or self.norm is None or grad is None or norm is None:
            return True
        return not (_same(norm, self.norm) and _alike(_a_few(local(grad)), self._left[2]))

    def add(self, microbatch: int, gradient: Tensor, half: int, weight: float | None) -> None:
        """Count a microbatch, 1-based."""
        if self.keep:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            self.samples[microbatch - 1] = gradient.to(dtype, copy=True)
        if self.microbatch == 0:
            self.reached = [0, 0]
        self.reached[half] += weight != 0.0
        self.sums.add(gradient, half, self.microbatch == 0, 1.0 if weight is None else weight)
        self.microbatch = microbatch


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether all values are the same; NaN is the same as NaN, and such a step is skipped later."""
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def _a_few(gradient: Tensor) -> list[Any]:
    """Some values of a gradient, spread over it; none where to compare them would wait for a device."""
    if gradient.device.type != "cpu" or not gradient.is_contiguous():
        return []
    stride = max(1, gradient.numel() // 8)
    with torch.no_grad():
        return gradient.as_strided((-(-gradient.numel() // stride),), (stride,)).tolist()


def _alike(first: list[Any], second: list[Any]) -> bool:
    """Whether all numbers are the same, or NaN in both."""
    return first == second or all(a == b or (a != a and b != b) for a, b in zip(first, second, strict=True))
