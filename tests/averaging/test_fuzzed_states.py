"""A few cases of fuzz_states, which runs as many as are asked for."""

from __future__ import annotations

import pytest

from .fuzz_states import KINDS, try_case


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_states_are_refused_or_mean_what_they_say(kind: str) -> None:
    outcomes = {seed: try_case(kind, seed) for seed in range(20)}
    assert not {seed: found for seed, found in outcomes.items() if found[0] not in ("right", "refused")}
    assert "refused" in {outcome for outcome, _ in outcomes.values()}
