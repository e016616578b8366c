"""Averagers warn once, on the first rank, of averages that are not what one may expect."""

import warnings

import pytest
import torch
from torch import nn

from lagless import BEMA, EMA, Averager
from lagless.averaging import warn_of_rate
from lagless.rules import AverageWarning

BAD = {"bema": BEMA.paper(), "narrow": EMA(decay=0.3), "good": EMA(half_life_fraction=0.1)}


def follow(averager, steps):
    for _ in range(steps):
        averager.update()
    return averager


def told(action):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    assert all(w.category is AverageWarning for w in found)
    return [str(w.message) for w in found]


def test_a_known_length_is_judged_at_once_and_each_average_only_once():
    made = []
    messages = told(lambda: made.append(Averager(nn.Linear(2, 2), BAD, total_steps=400)))
    assert [m.split(":")[0] for m in messages] == ["average 'bema'", "average 'narrow'"]
    assert "65% of its weight on θ_0" in messages[0] and "half_life_fraction=0.05" in messages[0]
    assert "1.9 of 400 iterates" in messages[1]
    averager = follow(made[0], 400)
    assert not told(averager.warn_of_weights) and not told(lambda: averager.copy_to_model("bema"))


def test_final_weights_are_judged_where_the_length_was_not_known():
    averager = Averager(nn.Linear(2, 2), BAD)
    assert not told(lambda: follow(averager, 400))
    assert not told(lambda: averager.read("bema"))
    assert len(told(lambda: averager.copy_to_model("good"))) == 2
    assert not told(averager.warn_of_weights)


def test_a_run_that_was_joined_is_judged_from_there_on():
    averager = Averager({"w": torch.zeros(3)}, {"slow": EMA(decay=0.999)}, step=2000)
    follow(averager, 500)
    with pytest.warns(AverageWarning, match=r"61% of its weight on θ_2000, where averaging began, after 500 steps"):
        averager.warn_of_weights()


@pytest.mark.parametrize("steps", [1, 7, 60, 500])
def test_the_default_says_nothing(steps):
    model = nn.Linear(2, 2)
    assert not told(lambda: Averager(model))
    assert not told(lambda: follow(Averager(model, total_steps=steps), steps).copy_to_model())
    assert not told(lambda: follow(Averager(model), steps).copy_to_model())


def test_other_ranks_say_nothing(monkeypatch):
    monkeypatch.setattr("lagless.execution.Ranks.of_the_run", lambda: type("Ranks", (), {"rank": 1}))
    assert not told(lambda: Averager(nn.Linear(2, 2), BAD, total_steps=400))
    assert not told(lambda: warn_of_rate(0.0))


def test_they_can_be_filtered():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AverageWarning)
        Averager(nn.Linear(2, 2), BAD, total_steps=400)
    assert issubclass(AverageWarning, UserWarning)
