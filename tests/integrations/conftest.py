"""For all tests of trainers."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let toy runs go without advice: nine steps at a decaying rate deserve most of it, whatever the rule."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::lagless.rules.AverageWarning"), append=False)
