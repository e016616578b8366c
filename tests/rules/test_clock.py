"""The clock against its definition, walked and in closed form, with numbers and with tensors."""

import itertools
import random

import numpy as np
import pytest
import torch

import lagless
from lagless import BEMA, DEMA, EMA, OUEMA, PowerEMA, UniformAverage, WarmupEMA, WindowAverage
from lagless.optim._average_step import average_step, average_step_on_device, coefficients
from lagless.rules import Tick, UpdateSchedule, read_after, ticks
from lagless.theory.trajectories._run import moves

GRID = [*itertools.product((0, 1, 5, 12), (1, 2, 3, 7), (0, 1, 4, 5, 6, 20))]
RULES = [
    lambda **clock: EMA(half_life=4, **clock),
    lambda **clock: EMA(half_life_fraction=0.2, **clock),
    lambda **clock: BEMA.paper(**clock),
    lambda **clock: BEMA.paper(form="trl", **clock),
    lambda **clock: OUEMA.paper(**clock),
    lambda **clock: DEMA.paper(**clock),
    lambda **clock: UniformAverage(**clock),
    lambda **clock: PowerEMA(**clock),
    lambda **clock: WindowAverage(window=3, **clock),
    lambda **clock: WarmupEMA(**clock),
]
ON_DEVICE = [
    lambda **clock: EMA(decay=0.9, **clock),
    lambda **clock: EMA(**clock),
    lambda **clock: EMA(form="pace", **clock),
    lambda **clock: EMA(half_life_fraction=0.2, **clock),
    lambda **clock: UniformAverage(**clock),
    lambda **clock: PowerEMA(**clock),
]


def by_definition(after: int, freq: int, steps: list[int]) -> list[Tick]:
    """Updates at t > τ with (t - τ) mod φ = 0, as the specification has it."""
    due = [t for t in steps[1:] if t > after and (t - after) % freq == 0]
    return [Tick(t, due[k - 1] if k else max(after, steps[0]), k + 1) for k, t in enumerate(due)]


@pytest.mark.parametrize(("after", "freq", "start"), GRID)
def test_walk_and_jumps_are_the_definition(after, freq, start):
    clock = UpdateSchedule(after, freq)
    for end in range(start, start + 40):
        expected = by_definition(after, freq, list(range(start, end + 1)))
        events = list(clock.events(range(start, end + 1)))
        assert [event.last for event in events if event.updates] == expected
        assert clock.last(end, start) == (expected[-1] if expected else clock.begin(start))
        assert clock.count(end) - clock.count(start) == len(expected)
        assert [t for t in clock.update_steps(end) if t > start] == [tick.step for tick in expected]
        if end > max(start, after):
            before = clock.last(end - 1, start)
            assert clock.tick_at(end, start) == before.following(end)
            assert clock.updates(end) == (clock.last(end, start) == clock.tick_at(end, start))
        assert [event.step for event in events if event.follows] == [t for t in range(start + 1, end + 1) if t <= after]


def test_irregular_steps_walk_as_defined():
    draw = random.Random(0)
    for after, freq, start in GRID:
        steps = [start, *sorted(draw.sample(range(start + 1, start + 60), 20))]
        events = list(UpdateSchedule(after, freq).events(steps))
        assert [event.last for event in events if event.updates] == by_definition(after, freq, steps)
        assert [event.step for event in events] == steps[1:]


def test_hold_refreshes_once():
    events = UpdateSchedule(4, 2, hold=True).events(range(9))
    assert [(e.step, e.follows, e.updates) for e in events if e.follows or e.updates] == [
        (4, True, False),
        (6, False, True),
        (8, False, True),
    ]


@pytest.mark.parametrize("make", RULES)
def test_reads_agree_everywhere(make):
    """Walked, in closed form, as weights, in theory and in an optimizer: one read at every step."""
    for after, freq in ((0, 1), (0, 3), (5, 3)):
        rule = make(update_after=after, update_freq=freq)
        steps = list(range(after + 4 * freq + 2))
        for event in rule.schedule.events(steps):
            read = read_after(rule, event.last, event.step)
            assert read == read_after(rule, rule.schedule.last(event.step), event.step)
            assert read == coefficients(rule, event.step)
            if read is not None:
                newest = event.last if event.updates else event.last.following(event.step)
                move = next(move for move in moves(rule, steps, [event.step]) if move.read)
                assert move.tick == newest == rule.schedule.tick_at(event.step)
                update, after_it = rule.update(newest), rule.read(newest)
                weight = after_it.live + sum(c * v for c, v in zip(after_it.buffers, update.live, strict=True))
                assert np.isclose(lagless.trajectory_weights(rule, steps, event.step)[event.step], weight, rtol=1e-14)
        assert list(ticks(rule, steps)) == by_definition(after, freq, steps)


@pytest.mark.parametrize("make", ON_DEVICE)
def test_tensors_of_steps_are_the_same_clock(make):
    for after, freq in itertools.product((0, 1, 5), (1, 2, 3, 7)):
        rule = make(update_after=after, update_freq=freq)
        steps = range(1, after + 5 * freq + 3)
        weights, decays = average_step_on_device(rule, torch.tensor(list(steps), dtype=torch.float64))
        for step, weight, decay in zip(steps, weights.tolist(), decays.tolist(), strict=True):
            host = average_step(rule, step)
            follows = step <= after
            assert (1.0 if follows else host.weight) == pytest.approx(weight, rel=1e-14, abs=0.0)
            assert host.decay == pytest.approx(decay, rel=1e-14, abs=0.0)


def test_clock_of_tensors_equals_that_of_numbers_exactly():
    for (after, freq, _), dtype in itertools.product(GRID, (torch.float64, torch.float32, torch.int64)):
        clock, numbers = UpdateSchedule(after, freq), range(after + 1, after + 30)
        steps = torch.tensor(list(numbers), dtype=dtype)
        rows = zip(*(column.tolist() for column in clock.tick_at(steps)), strict=True)
        assert [Tick(*row) for row in rows] == [clock.tick_at(t) for t in numbers]
        everything = torch.arange(after + 30, dtype=dtype)
        assert clock.updates(everything).tolist() == [clock.updates(t) for t in range(after + 30)]
        assert clock.follows(everything).tolist() == [clock.follows(t) for t in range(after + 30)]


def test_a_step_may_be_a_numpy_integer():
    clock = UpdateSchedule(2, 3)
    assert clock.tick_at(np.int64(8)) == clock.tick_at(8) == (8, 5, 2)
    assert clock.count(np.int64(8)) == 2
