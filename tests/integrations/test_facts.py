"""Mean age and effective iterates by recursion are those of the weights themselves."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lagless import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    PowerEMA,
    UniformAverage,
    WarmupEMA,
    WindowAverage,
    effective_iterates,
    mean_age,
    trajectory_weights,
)
from lagless.integrations._facts import AverageMoments

RULES = [
    lambda **clock: EMA(half_life=4, **clock),
    lambda **clock: EMA(half_life_fraction=0.2, **clock),
    lambda **clock: BEMA(half_life_fraction=0.2, **clock),
    lambda **clock: BEMA.paper(**clock),
    lambda **clock: BEMA.paper(form="trl", **clock),
    lambda **clock: OUEMA.paper(**clock),
    lambda **clock: DEMA.paper(**clock),
    lambda **clock: UniformAverage(**clock),
    lambda **clock: PowerEMA(**clock),
    lambda **clock: WindowAverage(window=3, **clock),
    lambda **clock: WarmupEMA(**clock),
]


@given(
    st.sampled_from(RULES), st.integers(0, 6), st.integers(1, 4), st.lists(st.integers(1, 40), min_size=1, max_size=5)
)
@settings(max_examples=150, deadline=None)
def test_moments_are_those_of_the_weights(make, update_after, update_freq, steps):
    rule = make(update_after=update_after, update_freq=update_freq)
    moments = AverageMoments(rule)
    for step in steps:  # in any order
        found = moments.at(step)
        if step < update_after + update_freq:
            assert found is None
            continue
        weights = trajectory_weights(rule, range(step + 1))
        expected = mean_age(weights, range(step + 1)), effective_iterates(weights)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert np.isfinite(found).all()
