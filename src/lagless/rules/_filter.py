"""A rule as a linear filter: the weight it puts on every iterate of a trajectory, and what those weights say.

Everything here is exact in float64 and costs O(r²) per step, r the number of the rule's buffers: weights are found by
running the recursion backwards on the read coefficients (its adjoint), not forwards on unit vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lagless.rules._clock import Tick, read_between_updates, ticks
from lagless.rules._rule import InitialWeights, ReadCoefficients, Rule

FloatArray = NDArray[np.float64]


class Anchor(NamedTuple):
    """Where an average began, and how much of it is still there.

    Attributes:
        step: of the weights that its buffers were set to: θ_0, or the last iterate followed through burn-in.
        weight: on those weights; negative where the rule extrapolates away from them.
    """

    step: int
    weight: float


def count_updates(rule: Rule, total_steps: int) -> int:
    """How many updates a run of ``total_steps`` optimizer steps gives.

    >>> from lagless import BEMA
    >>> count_updates(BEMA.paper(update_freq=400), 1000)
    2
    """
    return rule.schedule.count(total_steps)


def require_updates(rule: Rule, total_steps: int, after: int = 0) -> None:
    """Refuse a run in which ``rule`` would never update after step ``after``.

    Raises:
        ValueError: if ``total_steps`` ends before the first update.
    """
    if count_updates(rule, total_steps) <= count_updates(rule, after):
        raise ValueError(
            f"{type(rule).__name__}: update_after={rule.update_after}, update_freq={rule.update_freq} give no update "
            f"up to step {total_steps} from step {after} on: its average would be the initial model. "
            f"Choose update_after + update_freq <= {total_steps - after}."
        )


def trajectory_weights(rule: Rule, steps: ArrayLike, at: int | None = None) -> FloatArray:
    """The weight that ``rule``'s average puts on each iterate of a trajectory: ``μ̂ = Σ_i w_i θ_{steps[i]}``.

    During burn-in, and at ``steps[0]``, the average is the iterate itself. After it, iterates are updates where
    ``rule`` makes one (``(t - update_after) mod update_freq = 0``) and are skipped otherwise. The last one counts in
    any case: if the rule makes no update at ``at``, the weights are those of one further update there.

    Args:
        rule: the averaging rule.
        steps: shape (n,), the optimizer step of each iterate, strictly increasing; ``steps[0]`` is θ_0's.
        at: the step at which the average is read, one of ``steps``; default the last.

    Returns:
        Shape (n,), float64, summing to 1. Weights may be negative (BEMA, OUEMA, DEMA) and are 0 after ``at``.

    Raises:
        ValueError: if ``steps`` is not increasing, ``at`` is not in it, or the rule has made no update by then.

    Reference:
        The filter of ``docs/design.md``; for BEMA, Block and Zhang, arXiv 2508.00180, Algorithm 1.

    >>> from lagless import EMA
    >>> trajectory_weights(EMA(decay=0.5), [0, 1, 2, 3]).tolist()
    [0.125, 0.125, 0.25, 0.5]
    """
    times = check_steps(steps)
    end = len(times) - 1 if at is None else _index(times, at)
    past = times[: end + 1]
    weights = np.zeros(len(times))
    if rule.schedule.follows(past[-1]) or end == 0:
        weights[end] = 1.0
        return weights
    updates = list(ticks(rule, past))
    if not updates:
        if past[-1] <= rule.update_after:
            raise ValueError(
                f"{type(rule).__name__} rests until its burn-in ends, at step {rule.update_after}; there is no average "
                f"at step {past[-1]}."
            )
        spacing = f"every {rule.update_freq} steps after step {rule.update_after}"
        raise ValueError(
            f"{type(rule).__name__} updates {spacing} and so not once among the {len(past)} steps {_short(past)}. "
            f"Choose an update_freq that divides them, e.g. {common_update_freq(past, rule.update_after)}."
        )
    if updates[-1].step != past[-1]:
        updates.append(updates[-1].following(past[-1]))

    index = {step: i for i, step in enumerate(past)}
    coefficients = rule.read(updates[-1])
    weights[end] = coefficients.live
    for tick in reversed(updates):
        before = read_between_updates(rule.update(tick), ReadCoefficients(coefficients.buffers, 0.0))
        weights[index[tick.step]] += before.live
        coefficients = before
    weights[_origin(rule, past)] += sum(coefficients.buffers)
    return weights


def common_update_freq(steps: Sequence[int], update_after: int = 0) -> int:
    """The largest update_freq with which a rule updates at every step after burn-in (``steps[0]``, θ_0's, aside).

    >>> common_update_freq([0, 200, 300, 500])
    100
    """
    after = [step - update_after for step in steps[1:] if step > update_after]
    return math.gcd(*after) or 1


def equivalent_schedule(rule: Rule, steps: ArrayLike, at: int | None = None) -> FloatArray:
    """Return the multiplier of the learning rate that the average equals to first order.

        θ̄ = Σ_i w_i θ_i = θ_0 + Σ_j c_j Δ_j        c_j = Σ_{i≥j} w_i

    with Δ_j the change from iterate j - 1 to iterate j: for fixed gradients, the average is the run with its learning
    rate multiplied by c_j on the way to iterate j. The weights are its decrements, w_j = c_j - c_{j+1}.

    Args:
        rule: the averaging rule.
        steps: shape (n,), as for :func:`trajectory_weights`.
        at: the step at which the average is read; default the last.

    Returns:
        Shape (n,), float64; entry j belongs to the change that leads to ``steps[j]``. Entry 0 is 1, the sum of all
        weights. Entries after ``at`` are 0.

    Raises:
        ValueError: as :func:`trajectory_weights`.

    >>> from lagless import WindowAverage
    >>> equivalent_schedule(WindowAverage(window=2), [0, 1, 2, 3]).tolist()
    [1.0, 1.0, 1.0, 0.5]
    """
    return schedule_of(trajectory_weights(rule, steps, at))


def schedule_of(weights: ArrayLike) -> FloatArray:
    """Return the tail sums c_j = Σ_{i≥j} w_i of weights over iterates; see :func:`equivalent_schedule`.

    >>> schedule_of([0.25, 0.25, 0.5]).tolist()
    [1.0, 0.75, 0.5]
    """
    own = np.asarray(weights, dtype=np.float64)
    return np.array(np.flip(np.cumsum(np.flip(own))))


def weights_of(schedule: ArrayLike) -> FloatArray:
    """Return the weights w_j = c_j - c_{j+1} of the average that equals a schedule; the inverse of :func:`schedule_of`.

    Args:
        schedule: c, shape (n,), multipliers of the learning rate on the way to each iterate; ``schedule[0]`` is 1.

    >>> weights_of([1.0, 0.75, 0.5]).tolist()
    [0.25, 0.25, 0.5]
    """
    c = np.asarray(schedule, dtype=np.float64)
    return c - np.append(c[1:], 0.0)


def mean_age(weights: ArrayLike, steps: ArrayLike, at: int | None = None) -> float:
    """How far an average trails behind, in optimizer steps: Σ_i w_i (T - t_i). The lag of an EMA on a linear drift is
    this times the drift.

    Args:
        weights: shape (n,), from :func:`trajectory_weights`.
        steps: shape (n,), the same steps.
        at: T; default the last step.

    >>> mean_age([0.25, 0.25, 0.5], [0, 10, 20])
    7.5
    """
    times = np.asarray(steps, dtype=np.float64)
    return float(np.asarray(weights, dtype=np.float64) @ ((times[-1] if at is None else at) - times))


def effective_iterates(weights: ArrayLike) -> float:
    """How many iterates an average amounts to against independent noise: 1 / Σ_i w_i².

    >>> effective_iterates([0.25, 0.25, 0.25, 0.25])
    4.0
    """
    w = np.asarray(weights, dtype=np.float64)
    return float(1.0 / (w @ w))


def anchor(rule: Rule, steps: ArrayLike, at: int | None = None) -> Anchor:
    """Return the step at which an average began and the weight left there.

    Without burn-in that is θ_0; with it, the last iterate that was followed before the first update.

    Args:
        rule: the averaging rule.
        steps: shape (n,), as for :func:`trajectory_weights`.
        at: the step at which the average is read; default the last.

    Raises:
        ValueError: as :func:`trajectory_weights`.

    >>> from lagless import EMA
    >>> anchor(EMA(decay=0.5, update_after=10), [0, 10, 11, 12])
    Anchor(step=10, weight=0.25)
    """
    times = check_steps(steps)
    weights = trajectory_weights(rule, times, at)
    end = len(times) if at is None else times.index(at) + 1
    origin = _origin(rule, times[:end])
    return Anchor(times[origin], float(weights[origin]))


def run_anchor(rule: Rule, total_steps: int, start: int = 0, precision: float = 1e-4) -> Anchor:
    """Return the :func:`anchor` of a run that sees every step from ``start`` to ``total_steps``, and of it the last.

    Args:
        rule: the averaging rule.
        total_steps: the step at which the average is read.
        start: the step of θ_0.
        precision: older updates are left out once they can move less than about this weight.

    Raises:
        ValueError: if the rule makes no update in it.
    """
    require_updates(rule, total_steps, start)
    kept = [isinstance(label, InitialWeights) for label in rule.buffer_keys]
    coefficients: Sequence[float] = ()
    for _, _, coefficients in newest_first(rule, total_steps, start):
        if sum(abs(c) for c, is_start in zip(coefficients, kept, strict=True) if not is_start) < precision:
            break
    begin = rule.schedule.begin(start).previous
    return Anchor(begin, sum(coefficients))


def newest_first(rule: Rule, total_steps: int, start: int = 0) -> Iterator[tuple[Tick, float, Sequence[float]]]:
    """Walk back from the end of a run that sees every step, update by update.

    Args:
        rule: the averaging rule, with at least one update in the run.
        total_steps: the step at which the average is read.
        start: the step of θ_0.

    Yields:
        An update, the weight of its iterate, and the coefficients of the buffers as they were before that update.
    """
    schedule = rule.schedule
    tick = schedule.tick_at(total_steps, start)
    coefficients = rule.read(tick)
    while tick.number > 0:
        before = read_between_updates(rule.update(tick), coefficients)
        yield tick, before.live, before.buffers
        coefficients = before._replace(live=0.0)
        tick = schedule.last(tick.step - 1, start)


def weight_on_start(weights: ArrayLike) -> float:
    """The weight left on θ_0; negative where a rule extrapolates away from it. With burn-in, see :func:`anchor`.

    >>> weight_on_start([0.25, 0.75])
    0.25
    """
    return float(np.asarray(weights, dtype=np.float64)[0])


def check_steps(steps: ArrayLike) -> list[int]:
    """Steps as plain integers, required to be strictly increasing and not negative."""
    times = np.asarray(steps)
    if times.ndim != 1 or times.size == 0 or not np.issubdtype(times.dtype, np.integer):
        raise ValueError(
            f"steps must be a non-empty 1-D sequence of integers; got shape {times.shape}, dtype {times.dtype}."
        )
    gaps = np.diff(times.astype(np.int64))
    if (gaps <= 0).any():
        i = int(np.argmax(gaps <= 0))
        raise ValueError(f"steps must be strictly increasing; {int(times[i])} is followed by {int(times[i + 1])}.")
    if times[0] < 0:
        raise ValueError(f"steps must be >= 0; the first is {int(times[0])}.")
    return [int(t) for t in times]


def _index(times: list[int], at: int) -> int:
    if at not in times:
        raise ValueError(f"at={at} is not one of the steps {_short(times)}.")
    return times.index(at)


def _short(times: Sequence[int]) -> str:
    return ", ".join(map(str, times)) if len(times) <= 6 else f"{times[0]}, {times[1]}, ..., {times[-1]}"


def _origin(rule: Rule, past: Sequence[int]) -> int:
    """Index of the iterate that the buffers hold when burn-in ends: the last one followed, θ_0 if none was."""
    followed = [i for i, step in enumerate(past) if i == 0 or rule.schedule.follows(step)]
    return followed[-1]
