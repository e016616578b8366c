"""Warnings about averages that are not what one may expect: each once, on the first rank only."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from lagless.execution import Ranks
from lagless.rules import AverageWarning, Rule, Tick, rate_note, run_notes


class Notices:
    """Warns once of every average whose weights say little of the run, or let more noise in than they remove.

    Args:
        rules: by name.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self._rules = rules
        self._told: set[str] = set()

    def of_run(self, total_steps: int, start: int) -> None:
        """Warn of averages as they will be at ``total_steps`` in a run that they follow from step ``start`` on."""
        for name in self._rules:
            self._tell(name, total_steps, start)

    def of_present(self, step: int, last: Mapping[str, Tick]) -> None:
        """Warn of averages as they are now; those without an update are left out.

        Args:
            step: optimizer steps so far.
            last: the latest update of each rule.
        """
        for name, tick in last.items():
            rule = self._rules[name]
            if tick.number:
                missed = (tick.step - rule.update_after) // rule.update_freq - tick.number
                self._tell(name, step, rule.update_after + missed * rule.update_freq if missed else 0)

    def _tell(self, name: str, step: int, start: int) -> None:
        if name not in self._told and (notes := run_notes(self._rules[name], step, start)):
            self._told.add(name)
            _tell(f"average {name!r}: {' '.join(notes)}")


def warn_of_rate(share: float) -> bool:
    """Warn that averaging gains little after a learning rate that ended at ``share`` of its peak, if it does.

    Returns:
        Whether it was told.
    """
    if note := rate_note(share):
        _tell(note)
    return note is not None


def _tell(note: str) -> None:
    if Ranks.of_the_run().rank == 0:
        warnings.warn(note, AverageWarning, stacklevel=5)
