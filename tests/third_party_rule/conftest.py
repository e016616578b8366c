"""The package of a rule that lagless does not know, as if it were installed."""

import sys
from pathlib import Path

import pytest

collect_ignore = ["package"]
PACKAGE = Path(__file__).parent / "package"


@pytest.fixture
def two_speeds(monkeypatch):
    monkeypatch.syspath_prepend(str(PACKAGE))
    import two_speeds

    yield two_speeds
    sys.modules.pop("two_speeds", None)


@pytest.fixture
def environment(monkeypatch):
    """Environment variables with which a new process finds the package, and ones with which it does not."""
    import os

    source = str(Path(__file__).parents[2] / "src")
    without = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return {**without, "PYTHONPATH": os.pathsep.join([source, str(PACKAGE)])}, without
