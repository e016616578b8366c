"""Mutated recipes and studies load, or are refused in one line that names the file."""

import pytest

pytest.importorskip("pydantic")

from .fuzz_recipes import fuzz, outcome  # noqa: E402


def test_mutations_load_or_are_refused(tmp_path):
    found = fuzz(60, 0, tmp_path)
    assert sum(found.values()) == 60 and found["recipe refused"] and found["study refused"]


@pytest.mark.parametrize("error", [KeyError("a"), RecursionError(), ValueError("no file"), ValueError("m.yaml:\nx")])
def test_the_fuzzer_notices_faults(tmp_path, error):
    def load(path):
        raise error

    with pytest.raises(AssertionError):
        outcome(load, tmp_path / "m.yaml")
