"""Which hyperparameters of a rule are searched, and over which values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lagless.rules import EMA, Rule


@dataclass(frozen=True)
class SearchRange:
    """The values searched for one hyperparameter: ``points`` from ``low`` to ``high``, evenly or by equal factors."""

    low: float
    high: float
    logarithmic: bool = False
    points: int = 41

    @property
    def values(self) -> list[float]:
        """All values."""
        space = np.geomspace if self.logarithmic else np.linspace
        return [float(f"{value:.4g}") for value in space(self.low, self.high, self.points)]


SEARCH_RANGES: Mapping[str, SearchRange] = {
    "ema_power": SearchRange(0.0, 1.0),
    "bias_power": SearchRange(0.05, 5.0, logarithmic=True),
    "half_life_fraction": SearchRange(0.01, 0.9, logarithmic=True),
    "correction": SearchRange(0.0, 1.0, points=21),
    "relative_width": SearchRange(0.02, 0.28, logarithmic=True),
}
"""What is searched where a rule has it as a finite number. The rest of a rule stays as it is."""


NATURAL_ENDS: Mapping[str, tuple[float, ...]] = {"ema_power": (0.0,), "correction": (0.0, 1.0)}
"""Ends of ranges beyond which a hyperparameter does not go, so that a best setting there wants no wider range."""


def rules_searched(start: Rule) -> Iterator[Rule]:
    """Yield ``start`` with every combination of the hyperparameters in :data:`SEARCH_RANGES`.

    Combinations that the rule refuses are left out, as a width above that of its anchor.
    """
    names = _searched(start)
    for values in itertools.product(*(SEARCH_RANGES[name].values for name in names)):
        try:
            yield replace(start, **dict(zip(names, values, strict=True)))  # type: ignore[type-var]
        except ValueError:
            continue


def at_edge(rule: Rule) -> tuple[str, ...]:
    """Return the hyperparameters of a rule that lie at an end of their range, or beyond it."""
    found: list[str] = []
    for name in _searched(rule):
        value, ends = getattr(rule, name), SEARCH_RANGES[name]
        if not ends.low < value < ends.high and value not in NATURAL_ENDS.get(name, ()):
            found.append(name)
    return tuple(found)


def _searched(rule: Rule) -> list[str]:
    given = vars(rule)
    names = [name for name in SEARCH_RANGES if isinstance(given.get(name), int | float) and math.isfinite(given[name])]
    if isinstance(rule, EMA) and any(given[name] is not None for name in ("decay", "half_life", "half_life_fraction")):
        names = [name for name in names if name != "ema_power"]  # the gain is set in another way
    return names
