"""Averages by recursion are those of weighted sums up to rounding, whatever the cut of the tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file
from tests.model_files import make_state, save_model

from lagless import BEMA, DEMA, EMA, OUEMA, DecayAverage, PowerEMA, UniformAverage, WindowAverage
from lagless.checkpoints import CheckpointError, find_checkpoints, fingerprint
from lagless.execution import BLOCK
from lagless.posthoc import average_checkpoints

Make = Callable[..., Path]
RULES = {
    "ema": EMA(decay=0.3),
    "late": EMA(half_life_fraction=0.1, update_after=25),
    "sparse": EMA(decay=0.5, update_freq=20),
    "bema": BEMA.paper(update_freq=10),
    "dema": DEMA.paper(update_freq=10),
    "ouema": OUEMA.paper(update_freq=10),
    "uniform": UniformAverage(),
    "power": PowerEMA(),
    "window": WindowAverage(window=3),
    "decay": DecayAverage(duration=0.5, total_steps=100),
}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(9, 12))
def test_recursion_is_the_weighted_sum_up_to_rounding_and_keeps_what_is_equal(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: torch.dtype, count: int
) -> None:
    folder, generator = tmp_path_factory.mktemp("run"), torch.Generator().manual_seed(seed)
    fixed = torch.randn(500, generator=generator).to(dtype)
    fixed[:3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    constant = torch.rand(500, generator=generator) < 0.5
    constant[:3] = True
    states = []
    for step in range(count):
        w = torch.where(constant, fixed, torch.randn(500, generator=generator).to(dtype))
        states.append({"w": w, "step": torch.tensor(step), "bn.running_mean": torch.full((2,), float(step))})
        save_model(states[-1], folder / f"run/checkpoint-{10 * step}")
    summaries = average_checkpoints(folder / "run", RULES, folder / "out", dtype="float64", recursive=True)
    for summary in summaries:
        found = load_file(folder / "out" / summary.name / "model.safetensors")
        assert torch.equal(found["w"][constant], fixed[constant].double()), summary.name
        assert int(found["step"]) == count - 1 and found["bn.running_mean"].tolist() == [count - 1.0] * 2
        wanted = sum(w * s["w"].double()[~constant] for w, s in zip(summary.weights, states, strict=True))
        # Every one of N updates rounds a few times, and a rule that extrapolates multiplies by no more than 3 here.
        bound = 3 * 4 * count * 2.0**-24 * max(float(s["w"][~constant].abs().max()) for s in states)
        assert float((found["w"][~constant] - wanted).abs().max()) <= bound, summary.name


def test_every_element_is_computed_alike_wherever_blocks_end(make_run: Make, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    states = [{"w": torch.randn(2 * BLOCK + 77, generator=generator)} for _ in range(4)]
    average_checkpoints(make_run(states), RULES | {"decay": EMA()}, tmp_path / "out", recursive=True)
    cut = [{"w": state["w"][BLOCK:].clone()} for state in states]
    average_checkpoints(make_run(cut, name="cut"), RULES | {"decay": EMA()}, tmp_path / "two", recursive=True)
    for name in RULES:
        whole, part = (load_file(tmp_path / out / name / "model.safetensors")["w"] for out in ("out", "two"))
        assert torch.equal(whole[BLOCK:], part), name


def test_the_record_says_how_and_from_what(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(4)])
    average_checkpoints(run, EMA(decay=0.5), tmp_path / "out", recursive=True)
    import json

    record = json.loads((tmp_path / "out" / "lagless.json").read_text())
    assert record["accumulate"] == "recursion"
    prints = [fingerprint(c) for c in find_checkpoints(run).checkpoints]
    assert [source["fingerprint"] for source in record["sources"]] == prints


@pytest.mark.parametrize("place", [0, 2])
def test_values_that_are_not_finite_are_refused_by_name(make_run: Make, tmp_path: Path, place: int) -> None:
    states = [make_state(i) for i in range(4)]
    states[place]["mlp.weight"][3, 4] = torch.nan
    with pytest.raises(CheckpointError, match=f"checkpoint-{10 * (place + 1)}.*'mlp.weight' has nan at element 31"):
        average_checkpoints(make_run(states), EMA(decay=0.5), tmp_path / "out", recursive=True)
    average_checkpoints(tmp_path / "run", EMA(decay=0.5), tmp_path / "out", recursive=True, allow_nonfinite=True)


def test_an_infinity_that_does_not_stay_is_refused(make_run: Make, tmp_path: Path) -> None:
    states = [make_state(i) for i in range(4)]
    states[0]["mlp.weight"][0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="checkpoint-20.*earlier checkpoint infinity, at element 0"):
        average_checkpoints(make_run(states), EMA(decay=0.5), tmp_path / "out", recursive=True)


def test_given_weights_have_no_recursion(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(2)])
    with pytest.raises(ValueError, match="recursive=True forms averages of rules"):
        average_checkpoints(run, np.array([0.5, 0.5]), tmp_path / "out", recursive=True)
