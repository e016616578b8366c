"""For all tests."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_no_garbage():
    """Trainers ask for a collection in every run, which took half a second for what is imported alone."""
    gc.collect()
    gc.freeze()
