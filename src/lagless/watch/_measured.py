"""What an evaluation found of one model, and comparisons of two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Difference(NamedTuple):
    """A paired difference of losses and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Measured:
    """The loss of one model, the smaller the better.

    Attributes:
        loss: nats per token, or what a command calls loss; of tasks, 1 - accuracy.
        standard_error: of the loss; None where it is not known.
        n: how many sequences, prompts or items.
        further: other numbers, by name.
        items: the sums behind the loss, per item: nats and targets, or losses and ones. For paired comparisons.
    """

    loss: float
    standard_error: float | None = None
    n: int | None = None
    further: Mapping[str, float] = field(default_factory=dict)
    items: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def minus(self, other: Measured) -> Difference | None:
        """This loss minus the other's over the same items; None where items are not known, or differ."""
        if self.items is None or other.items is None or len(self.items[0]) < 2:
            return None
        (sums, counts), (other_sums, other_counts) = self.items, other.items
        if not np.array_equal(counts, other_counts):
            return None
        n, total = len(sums), float(counts.sum())
        value = float((sums - other_sums).sum()) / total
        residuals = (sums - other_sums) - value * counts
        return Difference(value, math.sqrt(float(residuals @ residuals) * n / (n - 1)) / total)

    def row(self) -> dict[str, Any]:
        """For the metrics."""
        known = {"loss": self.loss, "standard_error": self.standard_error, "n": self.n}
        return {key: value for key, value in known.items() if value is not None} | dict(self.further)
