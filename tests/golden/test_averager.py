"""States of Averagers, written by an earlier version, load and go on bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from .cases import END, FILES, GRIDS, RULES, SAVED, START_RULES, STORAGES, flat, follow, weights_at
from .names import Averager, trajectory_weights

FOLDER = FILES / "averager"
CASES: dict[str, tuple[dict[str, Any], torch.dtype, dict[str, Any]]] = {
    **{f"all-{name}": (RULES, weights, {"dtype": averages}) for name, (weights, averages) in STORAGES.items()},
    **{f"one-{name}": ({name: rule}, torch.float32, {}) for name, rule in RULES.items()},
    "start": (START_RULES, torch.float32, {"start": FOLDER / "base"}),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FOLDER / "expected.safetensors")


def resumed(case: str) -> tuple[Averager, dict[str, Tensor]]:
    rules, dtype, options = CASES[case]
    live = weights_at(SAVED, dtype)
    return Averager(live, rules, **options), live


def check_goes_on(case: str, averager: Averager, live: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Averages are the expected ones now, and after the rest of the run."""
    assert averager.step == SAVED
    for step in (SAVED, END):
        follow(averager, live, averager.step, step)
        for name in CASES[case][0]:
            average = flat(averager.read(name))
            wanted = expected[f"{case}/{step}/{name}"]
            assert average.dtype == wanted.dtype and torch.equal(average, wanted), f"{name} at step {step}"


@pytest.mark.parametrize("case", CASES)
def test_a_saved_file_goes_on(case: str, expected: dict[str, Tensor]) -> None:
    averager, live = resumed(case)
    averager.load(FOLDER / f"{case}.safetensors")
    check_goes_on(case, averager, live, expected)


def test_a_state_dict_in_a_torch_file_goes_on(expected: dict[str, Tensor]) -> None:
    averager, live = resumed("all-float32")
    averager.load_state_dict(torch.load(FOLDER / "all-float32.pt", weights_only=True))
    check_goes_on("all-float32", averager, live, expected)


def test_every_rule_that_has_a_state_here_is_known() -> None:
    assert {path.stem.removeprefix("one-") for path in FOLDER.glob("one-*")} == RULES.keys()


def test_trajectory_weights() -> None:
    stored = load_file(FILES / "trajectory_weights.safetensors")
    assert {name.split("/")[0] for name in stored} == RULES.keys()
    for name, wanted in stored.items():
        rule, grid = name.split("/")
        weights = torch.from_numpy(trajectory_weights(RULES[rule], GRIDS[grid]))
        # The exponent of PowerEMA is a root of a polynomial, from LAPACK, whose last bits depend on the processor.
        tolerance = 1e-13 if rule.startswith("power_ema") else 0.0
        torch.testing.assert_close(weights, wanted, rtol=tolerance, atol=0.0, msg=lambda text, at=name: f"{at}: {text}")
