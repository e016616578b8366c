"""A few cases of fuzz_states, which runs as many as are asked for."""

from __future__ import annotations

import os

import pytest

from .fuzz_states import MAKERS, prepare, try_case

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="cases run in forked processes"),
]


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare()


@pytest.mark.parametrize("kind", MAKERS)
def test_damaged_states_are_refused_or_mean_what_they_say(kind: str) -> None:
    outcomes = {seed: try_case(kind, seed) for seed in range(5)}
    assert not {seed: found for seed, found in outcomes.items() if found[0] not in ("right", "refused")}
    assert "refused" in {outcome for outcome, _ in outcomes.values()}
