"""A rank that dies while the ranks save together takes nothing with it that was there before."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ..processes import launch
from .killed_rank import save_until_killed


@pytest.mark.parametrize("what", ["save", "export", "average"])
def test_what_was_saved_before_stays_whole(tmp_path: Path, what: str) -> None:
    survivor, killed = launch(save_until_killed, 2, tmp_path, what)
    assert killed.exitcode == -signal.SIGKILL, killed.output
    assert "<kept>" in survivor.output, survivor.output
