"""Write what the finished cells of a study say: verdicts of its claims and the choice of a default rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.shared.cells import store
from experiments.shared.comparisons import (
    Cell,
    Cells,
    Claim,
    Judged,
    by_condition,
    compare,
    judge,
    losses,
)
from experiments.shared.decision import Standing, decide, mean_over_conditions, standings

from lagless.checkpoints import atomic_file

PARTS = ("reporting", "plays", "stories")
TEXTS = {"reporting": "books", "plays": "plays", "stories": "stories"}


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
    floor: float
    least_seeds: int


def write_summary(plan: Plan, cells: Sequence[Cell], folder: Path) -> dict[str, Any]:
    """Write ``summary.json`` and ``README.md``; return what is in the former."""
    summary = summarise(plan, cells)
    store(folder / "summary.json", summary, indent=1)
    with atomic_file(folder / "README.md") as partial:
        partial.write_text(_page(plan, summary), encoding="utf-8")
    return summary


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
        "claims": [_claim(one) for one in judged],
        "decision": [s.name for s in chosen],
        "against_present": [_against(deciding, s.name, plan.present) for s in chosen],
        "standings": [_standing(s) for s in standing],
        "beside": [_standing(s) for s in standings(deciding, plan.beside, PARTS)] if deciding else [],
        "others": [_standing(s) for s in standings(others, candidates, PARTS)] if others else [],
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


def _page(plan: Plan, summary: Mapping[str, Any]) -> str:
    done, planned = summary["cells"]["done"], summary["cells"]["planned"]
    parts = [
        f"# {plan.title}: results",
        f"{done} of {planned} runs are in. Design, claims and rules of decision were written before them: "
        f"`{plan.page}`. "
        "This page and `summary.json` are made of `cells/` by the study's command `report`. "
        "Differences are nats per token; negative is better.",
        "## Runs",
        _table(
            ["optimizer", "rate", "schedule", "batch", "seeds", *(f"live, {TEXTS[p]}" for p in PARTS), "θ_0, books"],
            [
                [c["optimizer"], f"{c['rate']:g}", c["schedule"], c["batch"], len(c["seeds"]),
                 *(f"{c['live'][p]:.3f}" for p in PARTS), f"{c['start']['reporting']:.3f}"]
                for c in summary["conditions"]
            ],
        ),
        "## The default rule",
        f"Difference to the live weights of the same run. Rules whose worst case, over all AdamW runs and the three "
        f"texts, is within {plan.floor} of the smallest are equal (marked *); the best mean on books wins among them. "
        f"Chosen by these runs: **{summary['decision'][0] if summary['decision'] else 'none yet'}**.",
        *(_against_present(summary["against_present"]) if summary["decision"] else []),
        *_by_width(summary["standings"]),
        "### All candidates",
        _standings(summary["standings"], summary["decision"]),
        "Beside them, over the same runs:",
        _standings(summary["beside"], []),
    ]  # fmt: skip
    if summary["others"]:
        parts += ["With SGD and momentum:", _standings(summary["others"], [])]
    parts += [
        "## Claims",
        f"Reporting books. Standard errors cover seeds and documents; those of documents alone are in brackets where "
        f"one seed is in. Verdicts need {plan.least_seeds} seeds, use p-values corrected by Holm over all comparisons, "
        f"and name no difference below {plan.floor}.",
        _table(
            ["", "claim", "source", "condition", "n", "difference", "method", "θ_0", "age/T", "iterates", "verdict"],
            [_claim_row(c) for c in summary["claims"]],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _claim_row(c: Mapping[str, Any]) -> list[Any]:
    at = c["condition"]
    method = c["method"]
    edge = f" (edge: {', '.join(c['at_edge'])})" if c["at_edge"] else ""
    return [
        c["key"], c["text"], c["source"], f"{at['optimizer']} {at['rate']:g}, {at['schedule']}, batch {at['batch']}",
        c["seeds"], f"{c['difference']:+.4f} {_error(c)}", f"`{method['name']}`{edge}", f"{method['theta_0']:.3f}",
        f"{method['age']:.3f}", f"{method['iterates']:.1f}", c["verdict"] or "too few seeds",
    ]  # fmt: skip


def _error(row: Mapping[str, Any]) -> str:
    if row["standard_error"] is None:
        return f"(± {row['standard_error_of_documents_alone']:.4f})"
    return f"± {row['standard_error']:.4f}"


def _against_present(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    present = rows[0]["present"]
    return [
        f"Against the present default, `{present}`, on books, mean over the conditions:",
        _table(
            ["rule", f"minus `{present}`", "seeds in all conditions"],
            [[f"`{row['name']}`", f"{row['difference']:+.4f} {_error(row)}", row["seeds"]] for row in rows],
        ),
    ]


COLUMNS = {
    "EMA": "ema-f f={f}",
    **{f"θ_0, c = {c}": f"bema-f f={{f}} c={c}" for c in ("0.25", "0.5", "1")},
    **{f"slow, c = {c}": f"slow-bema-f f={{f}} c={c}" for c in ("0.25", "0.5", "1")},
    "DEMA": "dema-f f={f}",
}


def _by_width(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of width by anchor and share of the lag removed."""
    named = {row["name"]: row for row in rows}
    shown: list[tuple[str, Callable[[Mapping[str, Any]], float | None]]] = [
        ("Books, mean over the runs at a constant rate", lambda row: row["mean_constant"]),
        ("Books, mean over the runs whose rate decays", lambda row: row["mean_decayed"]),
        ("Worst of all runs and texts", lambda row: max(row["worst"].values())),
    ]
    widths = [row["name"].removeprefix("ema-f f=") for row in rows if row["name"].startswith("ema-f ")]
    found = []
    for title, value in shown:
        table = [[f, *(value(named[name.format(f=f)]) for name in COLUMNS.values())] for f in widths]
        if not any(None in line for line in table):
            numbers = [[line[0], *(f"{number:+.4f}" for number in line[1:])] for line in table]
            found += [f"### {title}", _table(["f", *COLUMNS], numbers)]
    return found


def _standings(rows: Sequence[Mapping[str, Any]], chosen: Sequence[str]) -> str:
    ordered = sorted(rows, key=lambda r: max(r["worst"].values()))
    return _table(
        ["rule", "age/T", "iterates", "worst of all", "in", *(f"worst, {TEXTS[p]}" for p in PARTS),
         *(f"mean, {TEXTS[p]}" for p in PARTS), "books, constant", "books, decayed"],
        [
            [f"`{r['name']}`{' *' if r['name'] in chosen else ''}", f"{r['age']:.3f}", f"{r['iterates']:.1f}",
             f"{max(r['worst'].values()):+.4f}", r["worst_run"], *(f"{r['worst'][p]:+.4f}" for p in PARTS),
             *(f"{r['mean'][p]:+.4f}" for p in PARTS),
             *("" if r[key] is None else f"{r[key]:+.4f}" for key in ("mean_constant", "mean_decayed"))]
            for r in ordered
        ],
    )  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(map(str, head)), ["---"] * len(head), *(list(map(str, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
