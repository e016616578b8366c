"""Sums of powers of gradients, in float32 or wider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lagless.execution import compiled, fits_kernel, flat
from lagless.optim.bias_corrected._gradients import squared_norm


class Power(NamedTuple):
    """A sum to keep: Σ w_j g_j^exponent over the microbatches of one half (0 or 1), or of both (None)."""

    exponent: int
    half: int | None = None


class Sums(Protocol):
    """Sums over microbatches that scale by a known power of the gradients' scale.

    Attributes:
        totals: by a key with an ``exponent`` and a ``half``.
    """

    totals: dict[Any, Tensor]

    def add(self, gradient: Tensor, half: int, fresh: bool, weight: float = 1.0) -> None:
        """Count a microbatch of ``half``; the first one if ``fresh``.

        Its ``gradient`` is ``weight`` times its mean gradient, of whose power ``weight`` times is added.
        """
        ...


class PowerSums:
    """The sums of powers of one parameter's gradients.

    Args:
        powers: which ones.
        compile: add to several of them by one kernel, where the gradient is large and contiguous.
    """

    def __init__(self, powers: Sequence[Power], compile: bool = False) -> None:
        self.powers, self._compile = tuple(powers), compile
        self._of_half = [[power for power in self.powers if power.half in (None, half)] for half in (0, 1)]
        self.totals: dict[Power, Tensor] = {}

    def add(self, gradient: Tensor, half: int, fresh: bool, weight: float = 1.0) -> None:
        """Count a microbatch of ``half``, ``weight`` times its mean gradient; the first one if ``fresh``."""
        if not self.totals:
            self.start(gradient)
        mine = self._of_half[half]
        if fresh and len(mine) < len(self.powers):
            for power in self.powers:
                if power not in mine:
                    self.totals[power].zero_()
        if not mine:
            return
        exponents, row = [power.exponent for power in mine], [gradient, *(self.totals[power] for power in mine)]
        # One sum is one operation anyway, and every weight would need another kernel.
        if self._compile and len(mine) > 1 and weight == 1.0 and fits_kernel(row):
            compiled(_add_powers)(exponents, fresh, 1, *map(flat, row))
        else:
            _add_powers(exponents, fresh, weight, *row)

    def start(self, like: Tensor) -> None:
        """Make the sums that are not there yet, of 0."""
        wide = torch.promote_types(like.dtype, torch.float32)
        for power in self.powers:
            if power not in self.totals:
                self.totals[power] = torch.zeros_like(like, dtype=wide, memory_format=torch.preserve_format)


class SquareSum:
    """Σ w_j |g_j|² of one parameter's gradients, as one number."""

    key = Power(2)

    def __init__(self) -> None:
        self.totals: dict[Any, Tensor] = {}

    def add(self, gradient: Tensor, half: int, fresh: bool, weight: float = 1.0) -> None:
        """Count a microbatch, ``weight`` times its mean gradient; the first one if ``fresh``."""
        square = squared_norm(gradient)
        if weight != 1.0:
            square = square * rescale(weight, 2)
        self.totals[self.key] = square if fresh else self.totals[self.key] + square


def rescale(weight: float, exponent: int) -> float:
    """What turns (w·g)^exponent into w·g^exponent; 0 for w = 0, of which there is no g."""
    return weight ** (1 - exponent) if weight else 0.0


def _add_powers(exponents: Sequence[int], fresh: bool, weight: float, gradient: Tensor, *totals: Tensor) -> None:
    """``total ← total + w·(gradient/w)^exponent``, from 0 if ``fresh``."""
    g = gradient if gradient.dtype == totals[0].dtype else gradient.to(totals[0].dtype)
    square = g * g if max(exponents) > 2 else g
    for exponent, total in zip(exponents, totals, strict=True):
        factors = square if exponent > 2 else g, square if exponent == 4 else g
        if fresh and exponent > 1 and weight == 1.0:
            torch.mul(*factors, out=total)
            continue
        if fresh:
            total.zero_()
        if exponent == 1:
            total.add_(g)
        else:
            total.addcmul_(*factors, value=rescale(weight, exponent))
