"""The rules that one run follows: their clocks, and which of the shared buffers each of them uses."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping

from lagless.execution._rows import RowUpdate, in_place_order, update_rows
from lagless.rules import Rule, Tick, read_after

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


class RuleSet:
    """Rules by name, over buffers of which those with equal keys are one.

    Args:
        rules: name → rule.
        step: of the first weights that are seen.
        every_step: whether all later steps will be seen. Of stored checkpoints only some are, so that buffers must
            follow each of those in burn-in.

    Attributes:
        keys: what each distinct buffer holds.
        index: name → for each buffer of that rule's own, its place in ``keys``.
        last: name → the latest update.

    Raises:
        ValueError: if a name is not usable.
    """

    def __init__(self, rules: Mapping[str, Rule], step: int, every_step: bool = True) -> None:
        for name in rules:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name an average; use letters, digits, '.', '_' and '-'.")
        self.rules, self._every_step = rules, every_step
        self.keys: list[Hashable] = list(dict.fromkeys(key for rule in rules.values() for key in rule.buffer_keys))
        self.index = {name: [self.keys.index(key) for key in rule.buffer_keys] for name, rule in rules.items()}
        self.last: dict[str, Tick] = {name: rule.schedule.begin(step) for name, rule in rules.items()}

    def resolve(self, name: str | None) -> str:
        """Return the name of the rule that is meant; None means the only one."""
        if name is None and len(self.rules) == 1:
            return next(iter(self.rules))
        if name is None or name not in self.rules:
            problem = "say which average you mean" if name is None else f"there is no average {name!r}"
            raise ValueError(f"{problem}; this Averager follows {', '.join(self.rules)}.")
        return name

    def advance(self, step: int) -> tuple[list[RowUpdate], dict[str, Tick]]:
        """Return how buffers move at ``step``, in an order that can be applied in place, and ``last`` afterwards.

        Nothing is changed here: an update that fails is not counted.
        """
        rows: dict[int, RowUpdate] = {}
        last: dict[str, Tick] = {}
        for name, rule in self.rules.items():
            event = rule.schedule.advance(self.last[name], step)
            last[name] = event.last
            if event.updates:
                _merge(rows, update_rows(rule.update(event.last), self.index[name]), name)
            elif rule.schedule.changes(step) or (event.follows and not self._every_step):
                _merge(rows, [RowUpdate(i, 0.0, (), 1.0) for i in self.index[name]], name)
        return in_place_order(rows.values()), last

    def coefficients(self, name: str, step: int) -> tuple[list[tuple[int, float]], float]:
        """Return the weights of buffers (those that count) and of the live weights in a read at ``step``.

        Raises:
            RuntimeError: before the first update.
        """
        rule = self.rules[name]
        read = read_after(rule, self.last[name], step)
        if read is None:
            raise RuntimeError(
                f"{name!r} has had no update in {step} steps (update_after={rule.update_after}, "
                f"update_freq={rule.update_freq}), so there is no average yet. "
                + (
                    "Read it later, or choose a smaller update_freq; total_steps=... finds that out before training."
                    if step
                    else "Call attach(optimizer), or update() after every step."
                )
            )
        return [(self.index[name][j], w) for j, w in enumerate(read.buffers) if w != 0.0], read.live

    def buffer_names(self) -> list[str]:
        """Return the name under which a state holds each distinct buffer: the first rule's that uses it."""
        names: dict[int, str] = {}
        for rule, indices in self.index.items():
            for position, i in enumerate(indices):
                names.setdefault(i, f"{rule}.{position}")
        return [names[i] for i in range(len(self.keys))]


def _merge(rows: dict[int, RowUpdate], new: list[RowUpdate], name: str) -> None:
    for row in new:
        if rows.setdefault(row.buffer, row) != row:
            raise ValueError(
                f"{name!r} has a buffer with the label of another rule's, but updates it otherwise; labels must "
                "contain every hyperparameter on which the content of the buffer depends."
            )
