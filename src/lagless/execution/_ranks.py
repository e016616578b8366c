"""Processes that do one piece of work together: all of them finish it, or all of them fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lagless.execution._annotated import all_gather_object
from lagless.execution._errors import RankError

T = TypeVar("T")


class Ranks:
    """The processes of a group; without one, this process alone.

    Args:
        group: a process group of ``torch.distributed``, every process of which makes this and calls the same methods.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.

    >>> Ranks().together(lambda: 7)
    [7]
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @staticmethod
    def of_the_run() -> Ranks:
        """All processes of a distributed run; this one alone where ``torch.distributed`` is not in use."""
        return Ranks(dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)

    def together(self, work: Callable[[], T]) -> list[T]:
        """Call ``work`` on every rank, and give every rank the results of all.

        A rank that failed alone would leave the others waiting for it; here they learn of it. So ``work`` itself must
        not wait for other ranks.

        Raises:
            RankError: if it failed on another rank. An error of this rank is raised as it is.
        """
        if self._group is None:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        told = None if failure is None else f"{type(failure).__name__}: {failure}"
        outcomes = all_gather_object((result, told), self.size, self._group)
        if failure is not None:
            raise failure
        for rank, (_, message) in enumerate(outcomes):
            if message is not None:
                raise RankError(f"rank {rank} failed, so nothing was kept. {message}")
        return [result for result, _ in outcomes]

    def require_same(self, value: Any, what: str) -> None:
        """Refuse to begin what the ranks would not do alike.

        Raises:
            RankError: if ``value`` differs between ranks.
        """
        if any(other != value for other in self.together(lambda: value)):
            raise RankError(
                f"{what} differ between ranks, as in pipeline parallelism. Save state_dict() with "
                "torch.distributed.checkpoint, which does not need them alike."
            )
