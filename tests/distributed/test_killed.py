"""A rank that dies while the ranks save together takes nothing with it that was there before."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .ranks import launch


@pytest.mark.parametrize("what", ["save", "export", "average"])
def test_what_was_saved_before_stays_whole(tmp_path: Path, what: str) -> None:
    survivor, killed = launch("killed_rank", 2, tmp_path, what)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    assert "<kept>" in survivor.stdout, survivor.stdout
