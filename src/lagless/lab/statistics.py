"""Comparing methods over seeds: paired differences, intervals, and the rule by which a difference counts.

The rule is fixed before a study is run: methods are compared seed by seed, a difference counts if its two-sided Student
interval leaves 0 out, and p-values are corrected for the number of comparisons in the study (Holm). Everything is
reported with n and the standard error, whatever came out.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np
from scipy import stats

LEVEL = 0.05

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Mean:
    """A mean over independent runs.

    Attributes:
        value: the sample mean.
        standard_error: s/√n with s² = Σ(x - mean)²/(n - 1); NaN for one run.
        n: number of runs.
    """

    value: float
    standard_error: float
    n: int

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The two-sided Student interval value ± t_{n-1, 1-level/2} · standard error; infinite for one run."""
        if self.n < 2:
            return -np.inf, np.inf
        half = float(stats.t.isf(level / 2, self.n - 1)) * self.standard_error
        return self.value - half, self.value + half

    @property
    def p_value(self) -> float:
        """Of the two-sided t-test against 0; 1 for one run."""
        if self.n < 2:
            return 1.0
        if self.standard_error == 0.0:
            return float(self.value == 0.0)
        return float(2 * stats.t.sf(abs(self.value) / self.standard_error, self.n - 1))

    def __str__(self) -> str:
        return f"{self.value:+.4g} ± {self.standard_error:.2g} (n = {self.n})"


def mean(values: Sequence[float]) -> Mean:
    """The mean of independent runs, with its standard error.

    >>> print(mean([1.0, 2.0, 3.0]))
    +2 ± 0.58 (n = 3)

    Raises:
        ValueError: if there is no value, or one is not finite: a run that diverged is a result of its own and does not
            belong into a mean.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values has shape {array.shape}; give one number per run, and at least one.")
    if not np.isfinite(array).all():
        raise ValueError(f"values contains {array[~np.isfinite(array)][0]}; report runs that diverged apart.")
    spread = float(array.std(ddof=1) / np.sqrt(array.size)) if array.size > 1 else float("nan")
    return Mean(float(array.mean()), spread, array.size)


def paired_difference(method: Mapping[Key, float], baseline: Mapping[Key, float]) -> Mean:
    """Mean of method - baseline over the runs both have done, matched by key (a seed, or a seed and a prompt's number).

    Runs of one seed share data order and initial weights, whose effect cancels in the difference.

    >>> print(paired_difference({0: 1.0, 1: 2.0, 2: 2.6}, {0: 1.1, 1: 2.2, 2: 2.7}))
    -0.1333 ± 0.033 (n = 3)

    Raises:
        ValueError: if their keys differ: dropping runs silently would bias the comparison.
    """
    if method.keys() != baseline.keys():
        lone = sorted(map(str, method.keys() ^ baseline.keys()))
        raise ValueError(f"only one of the two has runs {', '.join(lone[:5])}; compare methods on the same seeds.")
    return mean([method[key] - baseline[key] for key in method])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those below α keeps the chance of any false rejection below α.

    Sorted ascending, p̃_(i) = max_{j ≤ i} min(1, (m - j + 1) p_(j)).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    Reference: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    m, adjusted, running = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


class Verdict(str, Enum):
    """What a study says of a claim."""

    REPRODUCED = "reproduced"
    NOT_SEEN = "not seen"
    CONTRADICTED = "contradicted"


def verdict(difference: Mean, *, claimed: int, p_value: float | None = None, level: float = LEVEL) -> Verdict:
    """Whether a difference bears a claim about its sign out.

    Args:
        difference: method - baseline.
        claimed: the sign that is claimed, -1 or +1.
        p_value: corrected for the study's number of comparisons; None for the difference's own.
        level: below which p-values count.

    Raises:
        ValueError: if ``claimed`` is neither -1 nor +1.
    """
    if claimed not in (-1, 1):
        raise ValueError(f"claimed={claimed}; it must be -1 (smaller is claimed) or +1.")
    p = difference.p_value if p_value is None else p_value
    if not p < level:
        return Verdict.NOT_SEEN
    return Verdict.REPRODUCED if difference.value * claimed > 0 else Verdict.CONTRADICTED
