"""Compare averages of finished runs: differences by seed and document, claims and their verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lagless.lab.statistics import LEVEL, Mean, Verdict, crossed_mean, edges, holm, mean, verdict

Cell = Mapping[str, Any]


class Condition(NamedTuple):
    """What runs have in common that differ in nothing but their seed."""

    optimizer: str
    rate: float
    schedule: str
    batch: int

    def __str__(self) -> str:
        return f"{self.optimizer} {self.rate:g}, {self.schedule}, batch {self.batch}"


Cells = Mapping[Condition, Mapping[int, Cell]]


def by_condition(cells: Iterable[Cell]) -> dict[Condition, dict[int, Cell]]:
    """Return finished cells by condition and seed."""
    found: dict[Condition, dict[int, Cell]] = {}
    for cell in cells:
        s = cell["setting"]
        found.setdefault(Condition(s["optimizer"], s["rate"], s["schedule"], s["batch"]), {})[s["seed"]] = cell
    return {condition: dict(sorted(seeds.items())) for condition, seeds in sorted(found.items())}


def losses(seeds: Mapping[int, Cell], name: str, part: str) -> np.ndarray:
    """Return the losses of one average, shape (seeds, documents)."""
    return np.array([cell["averages"][name][part] for cell in seeds.values()])


def against_live(seeds: Mapping[int, Cell], name: str, part: str) -> Mean:
    """Return an average's loss minus the live weights', over seeds and documents; of one seed, over documents."""
    gaps = losses(seeds, name, part) - losses(seeds, "live", part)
    return crossed_mean(gaps) if len(gaps) > 1 else mean(gaps[0].tolist())


def summary(cell: Cell, name: str) -> dict[str, Any]:
    """Return an average's weight on θ_0, mean age / T, effective iterates and clock."""
    kept = ("theta_0", "age", "iterates", "T", "gamma", "phi")
    return {key: value for key, value in cell["averages"][name].items() if key in kept}


class Best:
    """The setting with the lowest loss on the tuning part, mean over the seeds of a condition.

    Args:
        families: whose averages are candidates.
        grid: the values of every axis, for the check of edges; an average without an axis has ``natural`` there.
        natural: value of an axis beyond which it does not go.
    """

    def __init__(
        self, families: Sequence[str], grid: Mapping[str, Sequence[float]], natural: Mapping[str, float] | None = None
    ) -> None:
        self.families, self.grid, self.natural = families, grid, dict(natural or {})

    def __call__(self, seeds: Mapping[int, Cell]) -> tuple[str, list[str]]:
        """Return the name of the best average and the axes at whose edge it sits."""
        first = next(iter(seeds.values()))["averages"]
        names = [name for name, entry in first.items() if entry["family"] in self.families]
        scores = {name: math.fsum(cell["averages"][name]["tuning"] for cell in seeds.values()) for name in names}
        best = min(scores, key=scores.__getitem__)
        setting = {**self.natural, **first[best]["setting"]}
        return best, edges(setting, self.grid, {axis: [value] for axis, value in self.natural.items()})


Side = str | Best


@dataclass(frozen=True)
class Claim:
    """A claim about method − baseline in every condition that it is about.

    Attributes:
        key: by which the study's page names it.
        text: in words.
        source: where it is made.
        method: name of an average, or the best of a family.
        baseline: likewise.
        claimed: -1 if the method's loss is claimed to be lower, +1 if higher, 0 if nothing that matters lies between.
        schedules: learning-rate schedules that it is about.
        baseline_schedule: of the baseline's runs, if it is another.
        optimizers: whose runs it is about.
        no_worse: the claim is that the method loses less than the floor; ``claimed`` is 0 then.
    """

    key: str
    text: str
    source: str
    method: Side
    baseline: Side
    claimed: int
    schedules: tuple[str, ...] = ("constant",)
    baseline_schedule: str | None = None
    optimizers: tuple[str, ...] = ("adamw", "sgd")
    no_worse: bool = False


@dataclass(frozen=True)
class Comparison:
    """A claim in one condition."""

    claim: Claim
    condition: Condition
    method: str
    baseline: str
    at_edge: list[str]
    difference: Mean
    by_documents: Mean
    method_summary: Mapping[str, Any]
    baseline_summary: Mapping[str, Any]


def compare(claims: Sequence[Claim], cells: Cells, part: str) -> list[Comparison]:
    """Return every claim in every condition whose runs there are."""
    found = []
    for claim in claims:
        for condition, seeds in cells.items():
            if condition.schedule not in claim.schedules or condition.optimizer not in claim.optimizers:
                continue
            other = cells.get(condition._replace(schedule=claim.baseline_schedule or condition.schedule), {})
            shared = [seed for seed in seeds if seed in other]
            if not shared:
                continue
            sides = {seed: seeds[seed] for seed in shared}, {seed: other[seed] for seed in shared}
            (method, edge), (baseline, baseline_edge) = (
                side(runs) if isinstance(side, Best) else (side, [])
                for side, runs in zip((claim.method, claim.baseline), sides, strict=True)
            )
            x = losses(sides[0], method, part) - losses(sides[1], baseline, part)
            at_edge = [f"method's {axis}" for axis in edge] + [f"baseline's {axis}" for axis in baseline_edge]
            summaries = [summary(runs[shared[0]], name) for runs, name in zip(sides, (method, baseline), strict=True)]
            found.append(
                Comparison(
                    claim, condition, method, baseline, at_edge, crossed_mean(x), mean(x.mean(0).tolist()), *summaries
                )
            )
    return found


@dataclass(frozen=True)
class Judged:
    """A comparison with its verdict; no verdict if there are too few seeds."""

    comparison: Comparison
    p_value: float | None
    verdict: Verdict | None


def judge(comparisons: Sequence[Comparison], floor: float, least_seeds: int) -> list[Judged]:
    """Return verdicts, p-values corrected over all comparisons with enough seeds."""
    enough = [c for c in comparisons if c.difference.n >= least_seeds]
    adjusted = dict(zip(map(id, enough), holm([c.difference.p_value for c in enough]), strict=True))
    return [Judged(c, p := adjusted.get(id(c)), None if p is None else _verdict(c, p, floor)) for c in comparisons]


def _verdict(comparison: Comparison, p: float, floor: float) -> Verdict:
    claim, difference = comparison.claim, comparison.difference
    if claim.claimed:
        return verdict(difference, claimed=claim.claimed, p_value=p, floor=floor)
    matters = p < LEVEL and abs(difference.value) >= floor
    if claim.no_worse:
        if difference.interval()[1] < floor:
            return Verdict.REPRODUCED
        return Verdict.CONTRADICTED if matters and difference.value > 0 else Verdict.NOT_SEEN
    small = verdict(difference, claimed=1, p_value=p, floor=floor) is Verdict.TOO_SMALL
    return Verdict.REPRODUCED if small else Verdict.CONTRADICTED if matters else Verdict.NOT_SEEN
