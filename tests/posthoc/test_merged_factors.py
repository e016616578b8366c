"""Averages of the products BA of LoRA checkpoints, as adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lagless import EMA, UniformAverage
from lagless.checkpoints import CheckpointError
from lagless.cli import main
from lagless.posthoc import average_checkpoints

A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"
BIAS = "base_model.model.q_proj.lora_B.bias"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_dora": False}


def write(run: Path, states: list[dict[str, torch.Tensor]], **settings: object) -> Path:
    for number, state in enumerate(states):
        folder = run / f"checkpoint-{10 * number}"
        folder.mkdir(parents=True)
        save_file(state, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **settings}))
    return run


def adapters(count: int, rank: int, rows: int, columns: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(rank * rows)
    new = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    return [{A: new(rank, columns), B: new(rows, rank), BIAS: new(rows)} for _ in range(count)]


def product(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return state[B].double() @ state[A].double()


@pytest.mark.parametrize("rank, rows, columns", [(2, 5, 4), (3, 3, 8), (4, 3, 2)])  # the last: wider than its layer
def test_the_nearest_factors_of_the_averaged_product_are_written(tmp_path, rank, rows, columns):
    states = adapters(4, rank, rows, columns)
    (summary,) = average_checkpoints(
        write(tmp_path / "run", states), UniformAverage(), tmp_path / "out", dtype="float64", merged_lora=True
    )
    mean = sum(w * product(state) for w, state in zip(summary.weights, states, strict=True))
    left, values, right = np.linalg.svd(mean.numpy(), full_matrices=False)
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert written[A].shape == (rank, columns) and written[B].shape == (rows, rank)
    np.testing.assert_allclose(product(written), nearest, rtol=0, atol=1e-12)
    expected = sum(w * state[BIAS].double() for w, state in zip(summary.weights, states, strict=True))
    torch.testing.assert_close(written[BIAS], expected, rtol=0, atol=1e-6)  # what is no factor: averaged as it is
    said = json.loads((tmp_path / "out/lagless.json").read_text())["merged_lora"]
    left_out = float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))
    assert said == {"layers": 1, "largest_part_left_out": pytest.approx(left_out, abs=1e-12)}


def test_a_constant_adapter_stays_as_it_is_bit_for_bit(tmp_path):
    state = adapters(1, 2, 5, 4)[0]
    average_checkpoints(
        write(tmp_path / "run", [state] * 3), EMA(half_life=1.0), tmp_path / "out", merged_lora=True, dry_run=True
    )
    with pytest.warns(UserWarning, match="hold the same weights"):
        average_checkpoints(tmp_path / "run", EMA(half_life=1.0), tmp_path / "out", merged_lora=True)
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_a_turned_adapter_is_the_same_product(tmp_path):
    """B Q and Qᵀ A are another adapter in name only: averages of A and B apart differ, of BA do not."""
    state = adapters(1, 2, 5, 4)[0]
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))[0]
    turned = {A: turn.mT @ state[A], B: state[B] @ turn, BIAS: state[BIAS]}
    run = write(tmp_path / "run", [state, turned])
    average_checkpoints(run, [0.5, 0.5], tmp_path / "merged", dtype="float64", merged_lora=True)
    average_checkpoints(run, [0.5, 0.5], tmp_path / "apart", dtype="float64")
    found = {n: product(load_file(tmp_path / n / "adapter_model.safetensors")) for n in ("merged", "apart")}
    torch.testing.assert_close(found["merged"], product(state), rtol=0, atol=1e-6)
    assert (found["apart"] - product(state)).abs().max() > 0.1


@pytest.mark.parametrize(
    "settings",
    [{"target_parameters": ["mlp.experts"]}, {"kasa_config": {"beta": 1}}, {"use_bdlora": True},
     {"use_something_new": True}, {"peft_type": "VERA"}],
)  # fmt: skip
def test_adapters_that_are_more_than_a_product_are_refused(tmp_path, settings):
    run = write(tmp_path / "run", adapters(3, 2, 5, 4), **settings)
    with pytest.raises(CheckpointError, match="not known to depend on A and B through the product BA alone"):
        average_checkpoints(run, EMA(half_life=1.0), tmp_path / "out", merged_lora=True)
    assert not (tmp_path / "out").exists()


def test_other_inputs_are_refused(tmp_path):
    convolution = [{A: torch.randn(2, 3, 1, 1), B: torch.randn(4, 2, 1, 1)} for _ in range(3)]
    with pytest.raises(CheckpointError, match="such as those of a convolution"):
        average_checkpoints(write(tmp_path / "c", convolution), EMA(), tmp_path / "out", merged_lora=True)
    frozen = [{A: torch.randn(2, 3)} for _ in range(3)]
    with pytest.raises(CheckpointError, match="holds no LoRA adapter"):
        average_checkpoints(write(tmp_path / "f", frozen), EMA(), tmp_path / "out", merged_lora=True)
    with pytest.raises(ValueError, match="leave one of the two out"):
        average_checkpoints(tmp_path / "c", EMA(), tmp_path / "out", merged_lora=True, recursive=True)


def test_the_command_says_nothing_of_factors_averaged_apart(tmp_path, monkeypatch, capsys):
    run = write(tmp_path / "run", adapters(4, 2, 5, 4))
    command = ["average", run, "-o", tmp_path / "out", "--rule", "ema", "--half-life", "9", "--merged-lora"]
    monkeypatch.setattr(sys, "argv", ["lagless", *map(str, command)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "averaged apart" not in capsys.readouterr().out
