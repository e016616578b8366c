from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.watch.trainer import QUICK, RULES

from lagless.watch import Watch

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are killed here, not machines; what must be on the disk before what is a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Callable[..., tuple[Watch, list[Row]]]]:
    """Starts a watch of ``run`` into ``out``, and gives the rows that it writes."""
    with ExitStack() as stack:

        def start(**options: Any) -> tuple[Watch, list[Row]]:
            rows: list[Row] = []
            given = {"run": tmp_path / "run", "out": tmp_path / "out", "rules": RULES, "settings": QUICK} | options
            return stack.enter_context(Watch(**given, sinks=[rows.append])), rows

        yield start
