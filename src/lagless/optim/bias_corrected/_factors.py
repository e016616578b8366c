"""A matrix as blocks, each with a left and a right factor, and what microbatches add to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lagless.optim.bias_corrected._sums import Power, rescale
from lagless.updates import energies


class FactorKey(NamedTuple):
    """A sum over microbatches that belongs to a factor: of G Gᵀ (order 0), ‖Gᵀq‖² (1) or its square (2)."""

    exponent: int
    half: int | None
    factor: int
    order: int


class Factor(NamedTuple):
    """One side of one block.

    Attributes:
        number: 2 · number of the block, plus 1 for the right side.
        rows: of the block.
        columns: of the block.
    """

    number: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def size(self) -> int:
        """Number of rows and columns of the factor."""
        start, stop = self.columns if self.number % 2 else self.rows
        return stop - start

    @property
    def gram(self) -> FactorKey:
        """The key of Σ G Gᵀ, over the second half of the microbatches."""
        return FactorKey(2, 1, self.number, 0)

    def energy(self, exponent: int, half: int | None) -> FactorKey:
        """The key of Σ ‖Gᵀq‖² (exponent 2) or of the sum of its squares (exponent 4)."""
        return FactorKey(exponent, half, self.number, exponent // 2)

    def name(self, what: str) -> str:
        """Of a tensor of the state."""
        return f"{'right' if self.number % 2 else 'left'}_{what}_{self.number // 2}"

    def of(self, matrix: Tensor) -> Tensor:
        """The block, with the factor's side in front."""
        block = matrix[slice(*self.rows), slice(*self.columns)]
        return block.mT if self.number % 2 else block


class Partition:
    """The blocks of a matrix.

    Args:
        shape: of the matrix.
        block_size: longest side of a block; sides are cut into as few and as equal pieces as that takes.
    """

    numerator = Power(1, 0)

    def __init__(self, shape: Sequence[int], block_size: int) -> None:
        self._rows, self._columns = (_cut(size, block_size) for size in shape)

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        """Left and right factor of every block."""
        blocks = [(rows, columns) for rows in self._rows for columns in self._columns]
        return tuple(Factor(2 * i + side, *block) for i, block in enumerate(blocks) for side in (0, 1))

    def multiply(self, matrix: Tensor, roots: Sequence[Tensor]) -> Tensor:
        """P_L · block · P_R for every block."""
        result = torch.empty_like(matrix)
        for factor, left, right in zip(self.factors[::2], roots[::2], roots[1::2], strict=True):
            where = slice(*factor.rows), slice(*factor.columns)
            result[where] = left @ matrix[where] @ right
        return result


class FactorSums:
    """What a step's microbatches add to a matrix's factors.

    Args:
        partition: of the matrix.
        split: whether momentum and factors come from different halves.
        measure: whether to measure energies along ``vectors``.

    Attributes:
        due: whether the next step takes roots; nothing but momentum is summed otherwise.
        vectors: of every factor, or empty before the first roots.
    """

    def __init__(self, partition: Partition, split: bool, measure: bool) -> None:
        self.partition, self._split, self._measure = partition, split, measure
        self.totals: dict[Any, Tensor] = {}
        self.due = True
        self.vectors: list[Tensor] = []

    def add(self, gradient: Tensor, half: int, fresh: bool, weight: float = 1.0) -> None:
        """Count a microbatch of ``half``, ``weight`` times its mean gradient; the first one if ``fresh``."""
        g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if fresh:
            self.totals.clear()
        if self._split:
            self._take(self.partition.numerator, half, g.clone)
        if not self.due:
            return
        for i, factor in enumerate(self.partition.factors):
            block = factor.of(g)
            if self._split:
                scale = rescale(weight, 2)
                self._take(factor.gram, half, lambda block=block, scale=scale: scale * (block @ block.mT))
            if self._measure and self.vectors:
                of = 1 if self._split else None
                energy = rescale(weight, 2) * energies(block, self.vectors[i])
                self._take(factor.energy(2, of), half, energy.clone)
                self._take(factor.energy(4, of), half, lambda e=energy: rescale(weight, 2) * e.square())

    def _take(self, key: Any, half: int, value: Callable[[], Tensor]) -> None:
        """Add to a sum, if it is of this half; make it in any case, since all processes must have the same sums."""
        mine = key.half in (None, half)
        if key not in self.totals:
            self.totals[key] = value() if mine else torch.zeros_like(value())
        elif mine:
            self.totals[key].add_(value())


def _cut(size: int, longest: int) -> list[tuple[int, int]]:
    pieces = -(-size // longest)
    edges = [round(i * size / pieces) for i in range(pieces + 1)]
    return list(zip(edges, edges[1:], strict=False))
