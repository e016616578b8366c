"""Groups of tensors that have weights of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from lagless.posthoc._weighted_sums import Consumer

REST = "rest"


class TensorGroups:
    """Divides tensors into groups by regular expressions on their names.

    A tensor is in the first group whose expression is found in its name, and in ``"rest"`` if there is none.

    Args:
        patterns: regular expressions by the name of the group; none for one group of all tensors.
        tensors: names of all tensors.

    Attributes:
        patterns: as given.
        names: of the groups that have a tensor, in order.

    Raises:
        ValueError: if an expression is not valid, or a group is left without a tensor.

    >>> groups = TensorGroups({"embeddings": "embed", "norms": "norm"}, ["embed.weight", "0.norm.weight", "0.mlp"])
    >>> groups.names, groups.of("0.norm.weight")
    (('embeddings', 'norms', 'rest'), 1)
    """

    def __init__(self, patterns: Mapping[str, str], tensors: Iterable[str]) -> None:
        compiled: dict[str, re.Pattern[str]] = {}
        for name, pattern in patterns.items():
            if name == REST:
                raise ValueError(f"groups: {REST!r} is what no expression finds; choose another name.")
            try:
                compiled[name] = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"groups: {name}={pattern!r} is no regular expression ({error}).") from None
        tensors = list(tensors)
        found = {t: next((name for name, p in compiled.items() if p.search(t)), REST) for t in tensors}
        if empty := [name for name in compiled if name not in found.values()]:
            raise ValueError(
                f"groups: {empty[0]}={patterns[empty[0]]!r} finds no tensor that an earlier group has not; there are "
                f"{', '.join(tensors[:4])}{', ...' if tensors[4:] else ''}."
            )
        self.patterns = dict(patterns)
        self.names = tuple(name for name in (*compiled, REST) if name in found.values())
        self._of = {tensor: self.names.index(name) for tensor, name in found.items()}

    def of(self, tensor: str) -> int:
        """Return the index of a tensor's group."""
        return self._of[tensor]

    def consumer(self, consumer: Consumer) -> Consumer:
        """Return what takes the sums of every group for all tensors, and hands on each tensor's sum for its group."""

        def take(name: str, start: int, block: Tensor) -> None:
            row = self._of[name]
            consumer(name, start, block[row : row + 1])

        return take
