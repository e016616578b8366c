"""For all tests."""

import gc

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow at finding examples, which says nothing about the code.
settings.register_profile("lagless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lagless")


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_no_garbage():
    """Trainers ask for a collection in every run, which took half a second for what is imported alone."""
    gc.collect()
    gc.freeze()
