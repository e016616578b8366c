"""Compare methods over seeds and held-out documents: paired differences, intervals, and when a difference counts.

The rule is fixed before a study is run. Methods are compared seed by seed, and document by document where losses are
known for each. A difference counts if its two-sided Student interval leaves 0 out, with p-values corrected for the
number of comparisons in the study (Holm), and matters if it is at least as large as the study's effect floor.
Everything is reported with n and the standard error, whatever came out.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.05

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Mean:
    """A mean over independent runs, or over runs crossed with documents.

    Attributes:
        value: the sample mean.
        standard_error: s/√n with s² = Σ(x - mean)²/(n - 1), or that of :func:`crossed_mean`; NaN for one run.
        n: number of runs.
        documents: number of documents that each run was measured on, if the standard error covers them.
        degrees_of_freedom: of the Student interval; None for n - 1.
    """

    value: float
    standard_error: float
    n: int
    documents: int | None = None
    degrees_of_freedom: float | None = None

    @property
    def _freedom(self) -> float:
        return self.n - 1 if self.degrees_of_freedom is None else self.degrees_of_freedom

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the two-sided Student interval value ± t_{1-level/2} · standard error; infinite for one run."""
        if self.n < 2:
            return -np.inf, np.inf
        half = float(stats.t.isf(level / 2, self._freedom)) * self.standard_error
        return self.value - half, self.value + half

    @property
    def p_value(self) -> float:
        """Of the two-sided t-test against 0; 1 for one run."""
        if self.n < 2:
            return 1.0
        if self.standard_error == 0.0:
            return float(self.value == 0.0)
        return float(2 * stats.t.sf(abs(self.value) / self.standard_error, self._freedom))

    def __str__(self) -> str:
        documents = "" if self.documents is None else f" x {self.documents} documents"
        return f"{self.value:+.4g} ± {self.standard_error:.2g} (n = {self.n}{documents})"


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


def crossed_mean(values: ArrayLike) -> Mean:
    """Return the mean of values x_sd of seeds s crossed with documents d, with a standard error that covers both.

    The model is x_sd = μ + a_s + b_d + e_sd with independent random effects, estimated by moments, which for complete
    data are those of the mixed model. With the mean squares A between seeds, B between documents and E of what is left,
    and variances that come out negative set to 0, A' = max(A, E), B' = max(B, E),

        Var(mean) = (A' + B' - E) / (S D)        degrees of freedom = (A' + B' - E)² / (A'²/(S - 1) + B'²/(D - 1))

    the latter Satterthwaite's, with the sampling of E neglected. A two-way cluster bootstrap estimates the same
    variance. Simulated with 36 documents, 95 % intervals cover in 94 to 96 % of cases where seeds or documents matter,
    with 5 seeds and with 3, and in more where neither does.

    Args:
        values: shape (seeds, documents): differences of two methods in the same runs and documents, or losses.

    Raises:
        ValueError: if there are fewer than 2 documents, no seed, or a value that is not finite.

    Reference:
        Searle, Casella, McCulloch, *Variance Components* (1992), ch. 4; F. E. Satterthwaite, Biometrics 2 (1946); A. B.
        Owen, *The pigeonhole bootstrap*, Ann. Appl. Stat. 1 (2007).

    >>> print(crossed_mean([[1.0, 2.0, 4.0], [1.5, 2.0, 4.5], [1.0, 2.5, 4.5]]))
    +2.556 ± 0.94 (n = 3 x 3 documents)
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 2:
        raise ValueError(f"values has shape {x.shape}; give (seeds, documents) with at least 2 documents.")
    if not np.isfinite(x).all():
        raise ValueError(f"values contains {x[~np.isfinite(x)][0]}; report runs that diverged apart.")
    seeds, documents = x.shape
    mean_value = float(x.mean())
    if seeds == 1:
        return Mean(mean_value, float("nan"), 1, documents)
    by_seed, by_document = x.mean(1, keepdims=True), x.mean(0, keepdims=True)
    rest = x - by_seed - by_document + mean_value
    free_a, free_b = seeds - 1, documents - 1
    a = documents * float(((by_seed - mean_value) ** 2).sum()) / free_a
    b = seeds * float(((by_document - mean_value) ** 2).sum()) / free_b
    e = float((rest**2).sum()) / (free_a * free_b)
    a, b = max(a, e), max(b, e)
    total, spread = a + b - e, a**2 / free_a + b**2 / free_b
    freedom = total**2 / spread if spread > 0 else float(free_a)
    return Mean(mean_value, float(np.sqrt(total / x.size)), seeds, documents, freedom)


def edges(
    setting: Mapping[str, float],
    grid: Mapping[str, Sequence[float]],
    natural: Mapping[str, Sequence[float]] | None = None,
) -> list[str]:
    """Return the axes of a grid at whose ends a setting sits, where a winner may have won for want of a wider grid.

    >>> edges({"kappa": 0.2, "eta": 0.1}, {"kappa": [0.1, 0.2, 0.3], "eta": [0.1, 0.2, float("inf")]})
    ['eta']

    Args:
        setting: values by axis.
        grid: the values of every axis.
        natural: values beyond which an axis does not go, such as η = ∞; the end of the grid there is no edge.

    Raises:
        ValueError: if a value is not on the grid.
    """
    found = []
    for axis, values in grid.items():
        if setting[axis] not in values:
            raise ValueError(f"{axis}={setting[axis]} is not on its grid, {sorted(values)}.")
        ends = {min(values), max(values)} - set((natural or {}).get(axis, ()))
        if setting[axis] in ends and len(set(values)) > 1:
            found.append(axis)
    return found


def require_equal_resolution(method: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]) -> None:
    """Refuse to compare the best settings of two grids that have an axis in common with different values on it.

    The method whose grid is finer there would win by its resolution.

    Raises:
        ValueError: naming the axis and its values on both sides.
    """
    for axis in method.keys() & baseline.keys():
        if sorted(method[axis]) != sorted(baseline[axis]):
            raise ValueError(
                f"{axis} is {sorted(method[axis])} for the method and {sorted(baseline[axis])} for the baseline; the "
                "best of both can be compared only on the same values."
            )


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
    TOO_SMALL = "no difference that matters"


def verdict(
    difference: Mean, *, claimed: int, p_value: float | None = None, level: float = LEVEL, floor: float = 0.0
) -> Verdict:
    """Return whether a difference bears a claim about its sign out.

    Args:
        difference: method - baseline.
        claimed: the sign that is claimed, -1 or +1.
        p_value: corrected for the study's number of comparisons; None for the difference's own.
        level: below which p-values count.
        floor: the smallest difference worth naming, in the units of the difference. One that counts and is smaller,
            and one whose interval lies within ± ``floor``, is :attr:`Verdict.TOO_SMALL`. 0 names every difference.

    Raises:
        ValueError: if ``claimed`` is neither -1 nor +1, or ``floor`` is negative.
    """
    if claimed not in (-1, 1):
        raise ValueError(f"claimed={claimed}; it must be -1 (smaller is claimed) or +1.")
    if not floor >= 0.0:
        raise ValueError(f"floor={floor}; it must be 0 or a positive difference.")
    p = difference.p_value if p_value is None else p_value
    low, high = difference.interval(level)
    if -floor < low and high < floor or (p < level and abs(difference.value) < floor):
        return Verdict.TOO_SMALL
    if not p < level:
        return Verdict.NOT_SEEN
    return Verdict.REPRODUCED if difference.value * claimed > 0 else Verdict.CONTRADICTED
