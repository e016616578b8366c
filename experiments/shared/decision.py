"""Choose a default: how averages do against the live weights over all runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from experiments.shared.comparisons import Cells, losses, summary

from lagless.lab.statistics import Mean, crossed_mean, mean


@dataclass(frozen=True)
class Standing:
    """How an average does against the live weights of the same runs, over all runs.

    Attributes:
        name: of the average.
        mean: by part, the mean difference over runs.
        worst: by part, the largest.
        worst_run: of which run and part the largest of all is.
        constant: mean on the first part over the runs at a constant rate; NaN if there are none.
        decayed: and over those whose rate decays.
        summary: weight on θ_0, mean age / T, effective iterates, clock.
    """

    name: str
    mean: Mapping[str, float]
    worst: Mapping[str, float]
    worst_run: str
    constant: float
    decayed: float
    summary: Mapping[str, Any]


def standings(cells: Cells, names: Sequence[str], parts: Sequence[str], live: str = "live") -> list[Standing]:
    """Return how every named average stands against the live weights; ``parts[0]`` is the one that runs train for."""
    runs = [(condition, seed, cell) for condition, seeds in cells.items() for seed, cell in seeds.items()]
    constant = np.array([condition.schedule == "constant" for condition, _, _ in runs])
    found = []
    for name in names:
        gaps = {
            p: np.array([losses({0: c}, name, p).mean() - losses({0: c}, live, p).mean() for *_, c in runs])
            for p in parts
        }
        part = max(parts, key=lambda p: gaps[p].max())
        condition, seed, cell = runs[int(gaps[part].argmax())]
        first = gaps[parts[0]]
        found.append(
            Standing(
                name,
                mean={p: float(gaps[p].mean()) for p in parts},
                worst={p: float(gaps[p].max()) for p in parts},
                worst_run=f"{part}; {condition}, seed {seed}",
                constant=float(first[constant].mean()) if constant.any() else math.nan,
                decayed=float(first[~constant].mean()) if not constant.all() else math.nan,
                summary=summary(cell, name),
            )
        )
    return found


def mean_over_conditions(cells: Cells, method: str, baseline: str, part: str) -> tuple[Mean, Mean]:
    """Return method − baseline, mean over the conditions, with a standard error over seeds and documents.

    Seeds that are not in every condition are left out. The second mean has the standard error of documents alone, for
    want of a second seed.
    """
    shared = sorted(set.intersection(*(set(seeds) for seeds in cells.values())))
    tables = []
    for seeds in cells.values():
        kept = {seed: seeds[seed] for seed in shared}
        tables.append(losses(kept, method, part) - losses(kept, baseline, part))
    table = np.mean(tables, axis=0)
    return crossed_mean(table), mean(table.mean(0).tolist())


def decide(found: Sequence[Standing], floor: float) -> list[Standing]:
    """Return the averages whose worst case is within ``floor`` of the smallest, the best mean first.

    The mean is that of the first part.
    """
    least = min(max(s.worst.values()) for s in found)
    equal = [s for s in found if max(s.worst.values()) <= least + floor]
    return sorted(equal, key=lambda s: next(iter(s.mean.values())))
