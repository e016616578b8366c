"""Which parameters are stepped without correction, by parts of their names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

EXCLUDED = ("embed", "lm_head", "wte", "shared.")
_log = logging.getLogger("lagless")

Group = dict[str, Any]


class Exclusion:
    """A filter of parameters: those whose names contain one of some parts form groups of their own.

    Args:
        parts: of names, or one.
        corrected: whether a group is stepped otherwise than excluded ones.
        plain: settings of excluded groups.
        words: for what is done with them.
    """

    def __init__(
        self, parts: Sequence[str] | str, corrected: Callable[[Group], bool], plain: Group, words: str
    ) -> None:
        self.parts = (parts,) if isinstance(parts, str) else tuple(parts)
        self._corrected, self._plain, self._words = corrected, plain, words

    def split(self, group: Group, defaults: Group) -> Iterator[Group]:
        """Yield the groups that a new one becomes: itself where it has no names, or says itself how it is stepped."""
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        named = bool(params) and all(isinstance(p, tuple) for p in params)
        if not named or not self.parts or "cross_fit" in group or not self._corrected(defaults | group):
            yield group | {"params": params}
            return
        excluded = [any(part in name for part in self.parts) for name, _ in params]
        if not all(excluded):
            yield group | {"params": [p for p, out in zip(params, excluded, strict=True) if not out]}
        if any(excluded):
            chosen = [p for p, out in zip(params, excluded, strict=True) if out]
            yield (group | {"params": chosen} | self._plain)

    def report(self, name: str, groups: Sequence[Group]) -> None:
        """Log which parameters of the optimizer called ``name`` were excluded, or that they could not be told apart."""
        if not self.parts or not any(self._corrected(group) for group in groups):
            return
        if "param_names" not in groups[0]:
            _log.warning(
                "%s: parameters came without names, so embeddings could not be told apart and are corrected too. "
                "Rows of rare tokens then get a numerator without a preconditioner; pass model.named_parameters().",
                name,
            )
            return
        excluded = [n for group in groups if not self._corrected(group) for n in group["param_names"]]
        if excluded:
            _log.warning(
                "%s: %s for %s (names with %s); exclude=() treats them like the others.",
                name,
                self._words,
                ", ".join(excluded) if len(excluded) < 5 else f"{', '.join(excluded[:4])} and {len(excluded) - 4} more",
                ", ".join(self.parts),
            )
