"""What everything that holds averages can do: Averagers, optimizers that keep an average, merged adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class HoldsAverages(Protocol):
    """Averages of a model's weights that can be read, put in place for a while, or made the model's own.

    :class:`lagless.Averager` holds averages, and so do the optimizers that keep one in their state
    (:class:`lagless.optim.PACE`, ``Pullback``, ``PrimalAveraging``). Whatever takes one of them takes all of them:
    callbacks and :func:`lagless.integrations.distributed.export_model`.

    ``name`` says which average, and may be left out where there is only one.

    >>> from lagless import EMA, Averager
    >>> isinstance(Averager({"w": torch.ones(2)}, EMA()), HoldsAverages)
    True
    """

    def updates(self, name: str | None = None) -> int:
        """Return how many updates the average has had; it can be read from the first one on."""
        ...

    def read(self, *, dtype: torch.dtype | None = None) -> Mapping[str, Tensor]:
        """Return the averaged weights by name, as new tensors."""
        ...

    def named_averages(
        self, name: str | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Return the averaged weights one by one."""
        ...

    def applied(self, name: str | None = None) -> AbstractContextManager[None]:
        """Put the average into the model inside a ``with`` block, and the live bits back after it."""
        ...

    def copy_to_model(self, name: str | None = None) -> None:
        """Make the average the model's weights for good."""
        ...
