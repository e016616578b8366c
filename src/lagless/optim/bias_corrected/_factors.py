"""A matrix as blocks, each with a left and a right factor, and what microbatches add to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lagless.execution import Sharding, gather
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

    Of a sharded matrix every rank has the sums of all of it, for which microbatches are gathered, one matrix at a time,
    in the steps that take roots. The sum for the momentum is of this rank's part.

    Args:
        partition: of the matrix.
        split: whether momentum and factors come from different halves.
        measure: whether to measure energies along ``vectors``.
        sharding: of the matrix.

    Attributes:
        due: whether the next step takes roots; nothing but momentum is summed otherwise.
        vectors: of every factor, or empty before the first roots.
    """

    def __init__(self, partition: Partition, split: bool, measure: bool, sharding: Sharding) -> None:
        self.partition, self._split, self._measure, self._sharding = partition, split, measure, sharding
        self._half = 1 if split else None  # of the microbatches that count for the factors
        self.totals: dict[Any, Tensor] = {}
        self.due = True
        self.vectors: list[Tensor] = []

    def add(self, gradient: Tensor, half: int, fresh: bool, weight: float = 1.0) -> None:
        """Count a microbatch of ``half``, ``weight`` times its mean gradient; the first one if ``fresh``."""
        if fresh:
            self._start(gradient)
        if self._split and half == 0:
            self.totals[self.partition.numerator] += gradient
        grams, measured = self._wanted
        if self._half not in (None, half) or not (grams or measured):
            return
        # Gathering moves an offloaded part to the device of the mesh.
        g = gather(self._sharding.present(gradient)).to(gradient.device, _wide(gradient))
        scale = rescale(weight, 2)
        for i, factor in enumerate(self.partition.factors):
            block = factor.of(g)
            if grams:
                self.totals[factor.gram].add_(block @ block.mT, alpha=scale)
            if measured:
                energy = scale * energies(block, self.vectors[i])
                self.totals[factor.energy(2, self._half)] += energy
                self.totals[factor.energy(4, self._half)].add_(energy.square(), alpha=scale)

    @property
    def _wanted(self) -> tuple[bool, bool]:
        """Whether to sum G Gᵀ, and energies."""
        return self.due and self._split, self.due and self._measure and bool(self.vectors)

    def _start(self, like: Tensor) -> None:
        """Make all sums, of 0: processes must have the same, whatever half their microbatches are of."""
        self.totals, dtype = {}, _wide(like)
        if self._split:
            self.totals[self.partition.numerator] = torch.zeros_like(like, dtype=dtype)
        grams, measured = self._wanted
        for factor in self.partition.factors:
            keys = [(factor.gram, 2)] if grams else []
            keys += [(factor.energy(exponent, self._half), 1) for exponent in (2, 4)] if measured else []
            for key, dimensions in keys:
                self.totals[key] = torch.zeros([factor.size] * dimensions, dtype=dtype, device=like.device)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _cut(size: int, longest: int) -> list[tuple[int, int]]:
    pieces = -(-size // longest)
    edges = [round(i * size / pieces) for i in range(pieces + 1)]
    return list(zip(edges, edges[1:], strict=False))
