"""What a user may not expect of an average: weight left on the start, few iterates, noise, a decayed learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise

import numpy as np

from lagless.rules._clock import Tick
from lagless.rules._filter import Anchor, newest_first, require_updates, run_anchor
from lagless.rules._rule import InitialWeights, Rule

LARGEST_START = 0.2
"""Beyond this share, to either side, the start says more about an average than any group of its iterates."""

FEWEST_ITERATES = 3.0
"""Averages of less than three independent iterates keep most of the noise of a single one."""

LEAST_RATE = 0.1
"""Of the peak. Below it, the learning rate itself has averaged most of the noise away."""

_EXACT_UPDATES = 5_000  # walked through one by one; those before are taken together in groups
_GROUPS = 200
_LEAST_STEPS = 10  # in fewer, every average that follows the run closely is noisy
_PRECISION = 1e-4  # of the weight of updates that are left out


class AverageWarning(UserWarning):
    """A warning that an average is not what one may expect, with the numbers and what to do about it."""


def start_note(rule: Rule, start: Anchor, last_step: int) -> str | None:
    """Say what is wrong with the weight an average leaves where it began; None if it is at most 20 %.

    Below -20 % the average lies beyond the last weights, seen from the start: to first order it is the run with its
    learning rate multiplied by 1 - w from the beginning.
    """
    if abs(start.weight) <= LARGEST_START:
        return None
    length, changed = last_step - start.step, _arguments(rule)
    place = f"θ_{start.step}, where averaging began," if start.step else "θ_0"
    if start.weight > 0.0:
        settings = ("ema_power", "half_life", "decay") if rule.update_freq == 1 else ("update_freq",)
        shorter = [f"a smaller {name}" for name in settings if name in changed][-1:] or ["a narrower average"]
        return (
            f"{_written(rule)} leaves {start.weight:.0%} of its weight on {place} after {length:,} steps of "
            f"averaging. Use {_remedy(rule)}, which leaves none at any length, or {shorter[0]}."
        )
    weaker = ", or a larger bias_power" if hasattr(rule, "bias_power") else ""
    return (
        f"{_written(rule)} puts {start.weight:.0%} of its weight on {place} after "
        f"{length:,} steps of averaging: it goes {-start.weight:.0%} beyond the path of the run and overshoots where "
        f"that bends. Use {_remedy(rule)}, which does not extrapolate{weaker}."
    )


def run_note(rule: Rule, total_steps: int, start: int = 0) -> str | None:
    """:func:`start_note` of a run that sees every step from ``start`` to ``total_steps``."""
    # Without θ_0 in a buffer, weights are spread once they leave the newest updates, and a rough sum is enough.
    exact = any(isinstance(label, InitialWeights) for label in rule.buffer_keys)
    found = run_anchor(rule, total_steps, start, precision=_PRECISION if exact else LARGEST_START / 2)
    return start_note(rule, found, total_steps)


def spread_note(rule: Rule | None, effective: float, iterates: int, kind: str = "iterates") -> str | None:
    """Say that an average is noisier than one of its iterates, or amounts to few of them; None if it is neither.

    Few are less than three, and less than a tenth of all iterates there are (of stored checkpoints, less than half), so
    that short runs are not reproached with their length.

    Args:
        rule: the averaging rule; None for weights that were given.
        effective: the effective number of iterates, 1 / Σ_i w_i².
        iterates: how many the rule could have averaged.
        kind: what the iterates are called, in the plural.
    """
    name = "it" if rule is None else _written(rule)
    if effective < 1.0:
        remedy = f": {_calmer(rule)}" if rule is not None else ""
        return (
            f"{name} is noisier than the last {kind[:-1]} alone: the squares of its weights sum to "
            f"{1.0 / effective:.2f}, more than 1{remedy}"
        )
    share = 2.0 if kind == "checkpoints" else 10.0
    if rule is None or not effective < min(FEWEST_ITERATES, iterates / share) * (1.0 - 1e-9):
        return None
    wider = (
        f"Use {_remedy(rule)}, which widens with the run, or a wider average"
        if getattr(rule, "half_life_fraction", None) is None
        else f"Use a larger half_life_fraction, or more {kind}"
    )
    return f"{name} amounts to {effective:.1f} of {iterates:,} {kind} and averages little noise away. {wider}"


def run_notes(rule: Rule, total_steps: int, start: int = 0) -> list[str]:
    """Return what is to be said of an average that sees every step from ``start`` to ``total_steps``.

    That is :func:`start_note`, and, of ten steps or more, :func:`spread_note`, unless the weight on the start explains
    the few iterates.

    Raises:
        ValueError: if the rule makes no update in it.
    """
    require_updates(rule, total_steps, start)
    kept = [isinstance(label, InitialWeights) for label in rule.buffer_keys]
    squares, weight = 0.0, 0.0
    for number, (tick, live, coefficients) in enumerate(newest_first(rule, total_steps, start), 1):
        squares += live * live
        weight = sum(coefficients)
        if sum(abs(c) for c, is_start in zip(coefficients, kept, strict=True) if not is_start) < _PRECISION:
            break
        if number == _EXACT_UPDATES:  # the weights of single iterates before are small
            weight = _left_at_start(rule, tick, coefficients, start)
            break
    begin = rule.schedule.begin(start).previous
    beginning = start_note(rule, Anchor(begin, weight), total_steps)
    effective, iterates = 1.0 / (squares + weight * weight), total_steps - begin
    judged = iterates >= _LEAST_STEPS and (effective < 1.0 or not beginning)
    spread = spread_note(rule, effective, iterates) if judged else None
    return [note for note in (beginning, spread) if note is not None]


def rate_note(share: float) -> str | None:
    """Say that averaging gains little after a learning rate that ended at ``share`` of its peak; None from 10 % on."""
    if math.isnan(share) or share >= LEAST_RATE:
        return None
    return (
        f"the learning rate ends at {share:.0%} of its peak. Where it decays below {LEAST_RATE:.0%}, the last iterates "
        "hardly differ, and averaging gains little over the last one: compare the two. An average gains most on a "
        "constant rate, whose decay it replaces"
    )


def _left_at_start(rule: Rule, tick: Tick, coefficients: Sequence[float], start: int) -> float:
    """The weight that updates before ``tick`` leave on the start, of neighbouring ones each taken as the middle one."""
    found, schedule = np.asarray(coefficients), rule.schedule
    ends = np.linspace(0, tick.number - 1, min(_GROUPS, tick.number - 1) + 1).astype(int)
    for newest, oldest in pairwise(ends):  # counted from the tick backwards
        middle = schedule.last(tick.step - 1 - (int(newest) + int(oldest)) // 2 * rule.update_freq, start)
        found = found @ np.linalg.matrix_power(np.asarray(rule.update(middle).matrix), int(oldest - newest))
    return float(found.sum())


def _remedy(rule: Rule) -> str:
    burn_in = f", update_after={rule.update_after}" if rule.update_after else ""
    return f"EMA(half_life_fraction=0.05{burn_in})"


def _calmer(rule: Rule) -> str:
    """How a rule becomes less noisy."""
    if getattr(rule, "bias_power", None) is not None:
        return (
            "the correction outweighs what averaging gains; a larger bias_power corrects less, and a larger ema_power "
            "averages more"
        )
    return f"use {_remedy(rule)}, or a wider average"


def _written(rule: Rule) -> str:
    return f"{type(rule).__name__}({', '.join(_arguments(rule).values())})"


def _arguments(rule: Rule) -> dict[str, str]:
    """The arguments of a rule as written, without the defaults; ``ema_power`` stays where it sets the gain."""
    defaults = {f.name: f.default for f in fields(rule)}  # type: ignore[arg-type]
    values = vars(rule)
    widths = any(values.get(name) is not None for name in ("decay", "half_life", "half_life_fraction"))
    shown = [
        name
        for name, value in values.items()
        if name in defaults and (value != defaults[name] or (name in ("ema_power", "update_freq") and not widths))
    ]
    return {name: f"{name}={values[name]!r}" for name in shown}
