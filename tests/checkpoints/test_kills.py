"""Runs killed at random moments, in small number; kill_runs.py says how they are many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_killed_run_breaks_nothing_and_the_next_one_leaves_nothing() -> None:
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, "-W", "ignore", script, "10"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kills, 0 bad" in done.stdout
