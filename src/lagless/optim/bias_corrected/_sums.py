"""Sums of powers of gradients, in float32 or wider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


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
    """The sums of powers of one parameter's gradients."""

    def __init__(self, powers: Sequence[Power]) -> None:
        self.powers = tuple(powers)
        self.totals: dict[Power, Tensor] = {}

    def add(self, gradient: Tensor, half: int, fresh: bool) -> None:
        """Count a microbatch of ``half``; the first one if ``fresh``."""
        if not self.powers:
            return
        g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        square = None
        for power in self.powers:
            if power not in self.totals:
                self.totals[power] = torch.zeros_like(g, memory_format=torch.preserve_format)
            elif fresh:
                self.totals[power].zero_()
            if power.half not in (None, half):
                continue
            if power.exponent == 1:
                self.totals[power].add_(g)
            elif power.exponent == 2:
                self.totals[power].addcmul_(g, g)
            else:
                square = g * g if square is None else square
                self.totals[power].addcmul_(square, g if power.exponent == 3 else square)


def sum_over(group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over the processes."""
    works = [dist.all_reduce(t, group=group, async_op=True) for t in tensors]
    for work in works:
        if work is not None:
            work.wait()
