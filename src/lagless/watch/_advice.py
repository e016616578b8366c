"""What the numbers so far say, in sentences. Nothing is said that they do not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

LEVEL = 1.96
"""Standard errors beyond which a lead counts."""
_STREAK = 3
"""Evaluations in a row that show that averaging has stopped helping."""
_DECAYED = 0.8
"""Share of its peak below which a learning rate that falls counts as decaying."""
LIVE = "live"

Losses = Mapping[str, Mapping[int, float]]


def advice(losses: Losses, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what can be said.

    Args:
        losses: by name and step.
        rows: of the metrics, oldest first.
    """
    return [*_best(losses, rows), *_stopped(losses, rows), *_decaying(rows), *_too_often(rows)]


def _best(losses: Losses, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    leads = [row for row in rows if row.get("event") == "lead"]
    if not leads:
        return []
    last = [row for row in leads if row["step"] == leads[-1]["step"]]
    said = []
    for row in last[:2]:
        error = row.get("standard_error")
        lead = f"{row['lead']:+.4f}" + (f" ± {error:.4f}" if error is not None else " (standard error not known)")
        other = "the checkpoint itself" if row["over"] == LIVE else row["over"]
        said.append(f"{lead} over {other}")
    name, step = last[0]["name"], last[0]["step"]
    return [f"best at step {step}: {name}, with a loss of {losses[name][step]:.4f}; its lead is {' and '.join(said)}"]


def _stopped(losses: Losses, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Averaging helps where the best average is ahead of the checkpoint by more than chance."""
    live, helps = losses.get(LIVE, {}), dict[int, bool]()
    leads = {row["step"]: row for row in rows if row.get("event") == "lead" and row.get("over") == LIVE}
    for step, row in leads.items():
        if step in live and row.get("lead") is not None:
            helps[step] = row["lead"] > LEVEL * (row.get("standard_error") or 0.0)
    steps = sorted(helps)
    streak = 0
    while streak < len(steps) and not helps[steps[-1 - streak]]:
        streak += 1
    if streak < _STREAK or streak == len(steps):
        return []
    return [f"averaging has stopped helping since step {steps[-streak]}: no average is ahead of the checkpoints since"]


def _decaying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    rates = [(row["step"], row["learning_rate"], row["peak_rate"]) for row in rows if "peak_rate" in row]
    if len(rates) < 2 or not rates[-1][2]:
        return []
    (_, before, _), (step, now, peak) = rates[-2:]
    if not (now < before and now < _DECAYED * peak):
        return []
    return [
        f"the rate is decaying: {now:.3g} at step {step}, {now / peak:.0%} of its peak; averages gain less the nearer "
        "it comes to zero"
    ]


def _too_often(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    seconds = [row["seconds"] for row in rows if row.get("event") == "evaluated"][-5:]
    times = [(row["time"], row["step"]) for row in rows if row.get("event") == "absorbed"][-6:]
    gaps = [b - a for (a, _), (b, _) in zip(times, times[1:], strict=False) if b > a]
    skipped = any(row.get("event") == "skipped" for row in rows[-50:])
    if not seconds or len(gaps) < 2 or not (skipped or median(seconds) > median(gaps)):
        return []
    spacing = median([b - a for (_, a), (_, b) in zip(times, times[1:], strict=False)])
    every = int(spacing * (1 + max(1, round(median(seconds) / max(median(gaps), 1e-9)))))
    return [
        f"evaluate less often: an evaluation takes {median(seconds):.1f} s and a checkpoint comes every "
        f"{median(gaps):.1f} s; --eval-every {every} would do"
    ]
