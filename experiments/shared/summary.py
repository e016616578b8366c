"""What the finished cells of a study say, as plain JSON: verdicts of its claims and the choice of a default rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.shared.comparisons import (
    Cell,
    Cells,
    Claim,
    Judged,
    Side,
    against_live,
    by_condition,
    compare,
    judge,
    losses,
)
from experiments.shared.decision import Standing, decide, mean_over_conditions, standings

PARTS = ("reporting", "plays", "stories")


@dataclass(frozen=True)
class Plan:
    """What a study set out to do.

    Attributes:
        title: of the study.
        page: where its design was written before its runs.
        planned: number of cells.
        claims: in the order of the page.
        candidates: families that a default rule is chosen from.
        beside: names of averages that are shown beside them.
        present: the average that is the default at present.
        shown: by label, averages, or the best of a family, which the page begins with.
        floor: smallest difference worth naming, nats per token.
        least_seeds: fewer are not judged.
    """

    title: str
    page: str
    planned: int
    claims: Sequence[Claim]
    candidates: Sequence[str]
    beside: Sequence[str]
    present: str
    shown: Mapping[str, Side]
    floor: float
    least_seeds: int


def summarise(plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return verdicts and decision as plain JSON."""
    found = by_condition(cells)
    first = cells[0]["averages"] if cells else {}
    candidates = [name for name, entry in first.items() if entry["family"] in plan.candidates]
    deciding = {condition: seeds for condition, seeds in found.items() if condition.optimizer == "adamw"}
    others = {condition: seeds for condition, seeds in found.items() if condition.optimizer != "adamw"}
    standing = standings(deciding, candidates, PARTS) if deciding else []
    chosen = decide(standing, plan.floor) if standing else []
    judged = judge(compare(plan.claims, found, PARTS[0]), plan.floor, plan.least_seeds)
    return {
        "cells": {"done": len(cells), "planned": plan.planned},
        "conditions": [_condition(condition, seeds) for condition, seeds in found.items()],
        "floor": plan.floor,
        "shown": [
            _shown(label, side, condition, seeds)
            for label, side in plan.shown.items()
            for condition, seeds in found.items()
        ],
        "claims": [_claim(one) for one in judged],
        "decision": [s.name for s in chosen],
        "against_present": [_against(deciding, s.name, plan.present) for s in chosen],
        "standings": [_standing(s) for s in standing],
        "beside": [_standing(s) for s in standings(deciding, plan.beside, PARTS)] if deciding else [],
        "others": [_standing(s) for s in standings(others, candidates, PARTS)] if others else [],
    }


def _shown(label: str, side: Side, condition: Any, seeds: Mapping[int, Cell]) -> dict[str, Any]:
    name = side if isinstance(side, str) else side(seeds)[0]
    gap = against_live(seeds, name, PARTS[0])
    return {
        "label": label,
        "condition": condition._asdict(),
        "name": name,
        "difference": _number(gap.value),
        "standard_error": _number(gap.standard_error),
        "seeds": len(seeds),
    }


def _against(cells: Cells, name: str, present: str) -> dict[str, Any]:
    difference, by_documents = mean_over_conditions(cells, name, present, PARTS[0])
    return {
        "name": name,
        "present": present,
        "difference": _number(difference.value),
        "standard_error": _number(difference.standard_error),
        "standard_error_of_documents_alone": _number(by_documents.standard_error),
        "seeds": difference.n,
    }


def _condition(condition: Any, seeds: Mapping[int, Cell]) -> dict[str, Any]:
    live = {part: round(float(losses(seeds, "live", part).mean()), 4) for part in PARTS}
    start = {part: round(float(losses(seeds, "start", part).mean()), 4) for part in PARTS}
    return {**condition._asdict(), "seeds": list(seeds), "live": live, "start": start}


def _number(value: float, digits: int = 5) -> float | None:
    return None if not math.isfinite(value) else round(value, digits)


def _claim(judged: Judged) -> dict[str, Any]:
    c = judged.comparison
    low, high = c.difference.interval()
    return {
        "key": c.claim.key,
        "text": c.claim.text,
        "source": c.claim.source,
        "condition": c.condition._asdict(),
        "method": {"name": c.method, **c.method_summary},
        "baseline": {
            "name": c.baseline,
            "schedule": c.claim.baseline_schedule or c.condition.schedule,
            **c.baseline_summary,
        },
        "at_edge": c.at_edge,
        "difference": _number(c.difference.value),
        "standard_error": _number(c.difference.standard_error),
        "standard_error_of_documents_alone": _number(c.by_documents.standard_error),
        "interval": [_number(low), _number(high)],
        "seeds": c.difference.n,
        "documents": c.difference.documents,
        "p_value": None if judged.p_value is None else float(f"{judged.p_value:.3g}"),
        "verdict": None if judged.verdict is None else judged.verdict.value,
    }


def _standing(s: Standing) -> dict[str, Any]:
    return {
        "name": s.name,
        **s.summary,
        "mean": {part: _number(value) for part, value in s.mean.items()},
        "worst": {part: _number(value) for part, value in s.worst.items()},
        "worst_run": s.worst_run,
        "mean_constant": _number(s.constant),
        "mean_decayed": _number(s.decayed),
    }
