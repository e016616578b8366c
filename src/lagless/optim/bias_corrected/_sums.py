"""Sums of powers of gradients, in float32 or wider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lagless.optim._kernels import compiled, fits_kernel, flat


class Power(NamedTuple):
    """A sum to keep: Σ g_j^exponent over the microbatches of one half (0 or 1), or of both (None)."""

    exponent: int
    half: int | None = None


class Sums(Protocol):
    """Sums over microbatches that scale by a known power of the gradients' scale.

    Attributes:
        totals: by a key with an ``exponent`` and a ``half``.
    """

    totals: dict[Any, Tensor]

    def add(self, gradient: Tensor, half: int, fresh: bool) -> None:
        """Count a microbatch of ``half``; the first one if ``fresh``."""
        ...


class PowerSums:
    """The sums of powers of one parameter's gradients.

    Args:
        powers: which ones.
        compile: add to all of them by one kernel, where the gradient is large and contiguous.
    """

    def __init__(self, powers: Sequence[Power], compile: bool = False) -> None:
        self.powers, self._compile = tuple(powers), compile
        self.totals: dict[Power, Tensor] = {}

    def add(self, gradient: Tensor, half: int, fresh: bool) -> None:
        """Count a microbatch of ``half``; the first one if ``fresh``."""
        self.start(gradient)
        for power in self.powers:
            if fresh and power.half not in (None, half):
                self.totals[power].zero_()
        mine = [power for power in self.powers if power.half in (None, half)]
        if not mine:
            return
        exponents, row = tuple(power.exponent for power in mine), [gradient, *(self.totals[power] for power in mine)]
        if self._compile and fits_kernel(row):
            compiled(_add_powers)(exponents, fresh, *map(flat, row))
        else:
            _add_powers(exponents, fresh, *row)

    def start(self, like: Tensor) -> None:
        """Make the sums that are not there yet, of 0."""
        wide = torch.promote_types(like.dtype, torch.float32)
        for power in self.powers:
            if power not in self.totals:
                self.totals[power] = torch.zeros_like(like, dtype=wide, memory_format=torch.preserve_format)


def _add_powers(exponents: tuple[int, ...], fresh: bool, gradient: Tensor, *totals: Tensor) -> None:
    """``total ← total + g^exponent``, from 0 if ``fresh``."""
    g = gradient.to(totals[0].dtype)
    square = g * g if max(exponents) > 2 else g
    for exponent, total in zip(exponents, totals, strict=True):
        if fresh:
            total.zero_()
        if exponent == 1:
            total.add_(g)
        else:
            total.addcmul_(square if exponent > 2 else g, square if exponent == 4 else g)


def sum_over(group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over the processes."""
    works = [dist.all_reduce(t, group=group, async_op=True) for t in tensors]
    for work in works:
        if work is not None:
            work.wait()
