"""Averages change no bit of training, and a resumed run goes on bit for bit: the table of neutral_runs."""

from __future__ import annotations

import pytest

from .neutral_runs import Configuration, configurations, differences

TABLE = list(configurations())


def test_the_table_has_a_hundred_configurations_of_all_kinds() -> None:
    assert len(set(map(str, TABLE))) == len(TABLE) >= 100


@pytest.mark.parametrize("configuration", TABLE, ids=str)
def test_runs_are_neutral_and_resume_bit_for_bit(configuration: Configuration) -> None:
    assert not differences(configuration)
