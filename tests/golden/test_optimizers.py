"""Checkpoints of model and optimizer, written by an earlier version, load and go on bit for bit.

Shampoo multiplies matrices and takes eigenvectors, whose last bits depend on the processor: it must load the stored
bits, and go on within 1e-6. All others work element by element, and go on bit for bit, but for square roots: on a
processor that rounds those otherwise, the optimizers that take them go on within 1e-6 too, or the width of bfloat16.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .cases import (
    AVERAGED,
    BIAS_CORRECTED,
    END,
    FILES,
    OPTIMIZERS,
    SAVED,
    average_of,
    flat,
    new_parameters,
    same_roots,
    train,
    weights_of as weights,
)

FOLDER = FILES / "optimizers"


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FOLDER / "expected.safetensors")


def resumed(case: str) -> tuple[Any, list[tuple[str, nn.Parameter]], dict[str, Any]]:
    checkpoint = torch.load(FOLDER / f"{case}.pt", weights_only=True)
    parameters = new_parameters(case)
    optimizer = OPTIMIZERS[case](parameters)
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(checkpoint["model"][name])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return optimizer, parameters, checkpoint["optimizer"]


def tolerance_of(case: str) -> float:
    """The largest difference after the run; weights have sizes up to 1, and steps that of 0.02."""
    if case.startswith("shampoo"):
        return 1e-6
    if case.startswith(("sophia", "pullback-sgd")) or same_roots():
        return 0.0
    return 2.0**-7 if "bfloat16" in case else 1e-6


def tensors_of(state: Any) -> list[Tensor]:
    values = [value for entry in state["state"].values() for value in entry.values()]
    return [value for value in values if isinstance(value, Tensor)]


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_a_checkpoint_goes_on(case: str, expected: dict[str, Tensor]) -> None:
    optimizer, parameters, _ = resumed(case)
    if case.endswith("evaluating"):
        with pytest.raises(RuntimeError, match="train"):
            optimizer.step()
        optimizer.train()
    train(case, optimizer, parameters, SAVED, END)
    tolerance = tolerance_of(case)
    torch.testing.assert_close(flat(weights(parameters)), expected[f"{case}/weights"], rtol=0.0, atol=tolerance)
    if case in AVERAGED:
        average = flat(average_of(optimizer, parameters))
        torch.testing.assert_close(average, expected[f"{case}/average"], rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_loading_keeps_every_bit_of_the_state(case: str) -> None:
    optimizer, _, stored = resumed(case)
    held = tensors_of(optimizer.state_dict())
    for tensor in tensors_of(stored):
        same = [t for t in held if t.dtype == tensor.dtype and t.shape == tensor.shape and torch.equal(t, tensor)]
        assert same, f"a tensor of shape {tuple(tensor.shape)} is not in the state any more"


def test_every_stored_checkpoint_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.pt")} == AVERAGED.keys() | BIAS_CORRECTED.keys()
