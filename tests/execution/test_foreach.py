"""A canary: torch's private updates of lists do what they did, or ``execution/_foreach`` is where to mend them."""

import pytest
import torch

from lagless.execution import _foreach

NAMES = [name for name in vars(_foreach) if name.startswith("foreach_")]


def complain(what):
    return (
        f"torch {torch.__version__}: {what}. Mend src/lagless/execution/_foreach.py, whose names were seen in torch "
        f"{', '.join(_foreach.SEEN_IN)}."
    )


def test_this_release_was_seen():
    release = ".".join(torch.__version__.split(".")[:2])
    assert release in _foreach.SEEN_IN, complain("a release that nobody has looked at")


def further_arguments(name):
    """What torch's function of this name takes after the list of tensors: how many lists, then numbers."""
    lists = {"add": 1, "sub": 1, "mul": 1, "div": 1, "copy": 1, "lerp": 1, "addcmul": 2, "addcdiv": 2}
    operation = name.removeprefix("foreach_").rstrip("_")
    numbers = {"lerp": [0.25], "clamp_max": [1.5], "clamp_min": [1.5]}.get(operation, [])
    return lists.get(operation, 0), numbers


@pytest.mark.parametrize("name", NAMES)
def test_lists_are_updated_as_their_tensors_are(name):
    """Every function does to each tensor of a list what torch's public operation of that name does to one tensor."""
    count, numbers = further_arguments(name)
    lists = [[torch.rand(n, dtype=torch.float64) + i + 0.5 for n in (2, 3)] for i in range(count + 1)]
    operation = name.removeprefix("foreach_")
    public = {
        "zero_": lambda t: torch.zeros_like(t),
        "copy_": lambda t, other: other.clone(),
        "max": torch.max,
        "norm": torch.linalg.vector_norm,
    }.get(operation) or getattr(torch, operation.rstrip("_"))
    expected = [public(*(t.clone() for t in tensors), *numbers) for tensors in zip(*lists, strict=True)]
    returned = getattr(_foreach, name)(*lists, *numbers)
    found = lists[0] if name.endswith("_") else returned
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), complain(f"{name} computes otherwise")
