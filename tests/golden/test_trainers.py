"""A checkpoint of Lightning with averages, written by an earlier version, goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from .cases import END, FILES, MODEL_RULES, SAVED
from .names import load_average
from .trainers import LIGHTNING, fit

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("LeafSpec", "does not have many workers", "GPU available but not used")
]
pytestmark.append(pytest.mark.filterwarnings("ignore::lagless.rules.AverageWarning"))  # in a run of 16 steps


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FILES / "lightning.expected.safetensors")


def check(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> None:
    wanted = {key.removeprefix(prefix): t for key, t in expected.items() if key.startswith(prefix)}
    assert wanted and found.keys() == wanted.keys()
    assert all(torch.equal(found[key].detach(), tensor) for key, tensor in wanted.items()), prefix


def test_a_run_of_lightning_goes_on(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    _, module, averager = fit(tmp_path, END, LIGHTNING)
    assert averager.step == END
    check(dict(module.named_parameters()), expected, "live/")
    for name in MODEL_RULES:
        check(averager.read(name), expected, f"{END}/{name}/")


def test_averages_are_read_from_a_checkpoint_of_lightning(expected: dict[str, Tensor]) -> None:
    for name in MODEL_RULES:
        check(load_average(LIGHTNING, name), expected, f"{SAVED}/{name}/")
