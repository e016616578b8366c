"""What is equal in all checkpoints stays as it is, and statistics of activations are not averaged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file
from tests.model_files import make_state, save_model

from lagless import BEMA, DEMA, EMA, OUEMA, UniformAverage
from lagless.checkpoints import CheckpointError, find_checkpoints
from lagless.posthoc import average_checkpoints, combine_checkpoints

Make = Callable[..., Path]
RULES = {
    "ema": EMA(decay=0.3),
    "bema": BEMA.paper(update_freq=10),
    "dema": DEMA.paper(update_freq=10),
    "ouema": OUEMA.paper(update_freq=10),
    "uniform": UniformAverage(),
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.sampled_from(FLOATS), st.integers(2, 7), st.sampled_from([0.0, 0.5, 1.0]))
def test_elements_that_are_equal_everywhere_stay_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: torch.dtype, count: int, share: float
) -> None:
    run, generator = tmp_path_factory.mktemp("run"), torch.Generator().manual_seed(seed)
    fixed = torch.randn(3000, generator=generator).mul(1e3).to(dtype)
    constant = torch.rand(3000, generator=generator) < share
    states = [torch.where(constant, fixed, torch.randn(3000, generator=generator).to(dtype)) for _ in range(count)]
    for step, tensor in enumerate(states, 1):
        save_model({"w": tensor, "step": torch.tensor(step)}, run / f"run/checkpoint-{10 * step}")
    summaries = average_checkpoints(run / "run", RULES, run / "out")
    for summary in summaries:
        found = load_file(run / "out" / summary.name / "model.safetensors")["w"]
        assert torch.equal(found[constant], fixed[constant]), summary.name
        wanted = sum(weight * tensor.double() for weight, tensor in zip(summary.weights, states, strict=True))
        assert torch.allclose(found.double(), torch.as_tensor(wanted), rtol=4 * torch.finfo(dtype).eps, atol=0.02)


@pytest.mark.parametrize("allow", [False, True])
def test_a_mask_of_infinities_stays_one_under_negative_weights(make_run: Make, tmp_path: Path, allow: bool) -> None:
    mask = torch.full((40, 40), -torch.inf).triu(1)
    run = make_run([{"mask": mask, "w": torch.randn(5)} for _ in range(4)])
    average_checkpoints(run, RULES, tmp_path / "out", allow_nonfinite=allow)
    for name in RULES:
        assert torch.equal(load_file(tmp_path / "out" / name / "model.safetensors")["mask"], mask)


def test_values_that_are_not_finite_in_one_checkpoint_are_refused_beside_a_mask(make_run: Make, tmp_path: Path) -> None:
    states = [{"mask": torch.tensor([-torch.inf, 1.0, 2.0])} for _ in range(3)]
    states[1]["mask"] = torch.tensor([-torch.inf, torch.inf, 2.0])
    with pytest.raises(CheckpointError, match="checkpoint-20.*'mask' has inf at element 1"):
        average_checkpoints(make_run(states), BEMA.paper(update_freq=10), tmp_path / "out")


def test_nan_everywhere_is_refused(make_run: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'w' has nan at element 0"):
        average_checkpoints(make_run([{"w": torch.tensor([torch.nan])}] * 3), EMA(decay=0.5), tmp_path / "out")


def test_sums_that_are_no_averages_do_not_keep_constants(make_run: Make) -> None:
    paths = sorted(make_run([{"w": torch.ones(9), "mask": torch.tensor([-torch.inf])}] * 2).iterdir())
    found = combine_checkpoints(paths, [[1.0, -1.0], [2.0, 1.0], [0.5, 0.5]], allow_nonfinite=True)
    assert [float(state["w"][0]) for state in found] == [0.0, 3.0, 1.0]
    with pytest.raises(CheckpointError, match="'mask' has -inf"):
        combine_checkpoints(paths, [[1.0, -1.0], [0.5, 0.5]])


STATISTICS = ["bn.running_mean", "running_var", "a.bn.num_batches_tracked", "norm.moving_variance"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "rule", [BEMA.paper(update_freq=10), DEMA.paper(update_freq=10), OUEMA.paper(update_freq=10), EMA(decay=0.5)]
)
def test_running_statistics_are_those_of_the_last_checkpoint(
    make_run: Make, tmp_path: Path, rule: EMA, dtype: torch.dtype
) -> None:
    states = [{name: torch.rand(9).to(dtype) / 10**i for name in STATISTICS} | {"w": torch.randn(9)} for i in range(4)]
    average_checkpoints(make_run(states), rule, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], states[-1][name]) for name in STATISTICS)
    assert not torch.equal(found["w"], states[-1]["w"])


def test_statistics_of_a_start_of_another_type_are_read_as_they_are(make_run: Make, tmp_path: Path) -> None:
    run = make_run([{"running_var": torch.rand(5000), "w": torch.randn(3)} for _ in range(2)])
    save_model({"running_var": torch.rand(5000).double(), "w": torch.randn(3)}, tmp_path / "base")
    average_checkpoints(run, EMA(decay=0.5), tmp_path / "out", start=tmp_path / "base")
    last = load_file(run / "checkpoint-20" / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["running_var"], last["running_var"])


def test_statistics_that_are_not_finite_are_refused(make_run: Make, tmp_path: Path) -> None:
    states = [{"running_var": torch.ones(3)}, {"running_var": torch.tensor([1.0, torch.inf, 1.0])}]
    with pytest.raises(CheckpointError, match="checkpoint-20.*'running_var' has inf at element 1"):
        average_checkpoints(make_run(states), EMA(decay=0.5), tmp_path / "out")
    average_checkpoints(tmp_path / "run", EMA(decay=0.5), tmp_path / "out", allow_nonfinite=True)


def test_a_low_limit_on_open_files_is_respected(tmp_path: Path) -> None:
    """256 is the limit of macOS; 40 checkpoints read by 8 workers, and 300 models written, need more at once."""
    for step in range(1, 41):
        save_model({name: torch.randn(4) for name in "abcdefghij"}, tmp_path / f"run/checkpoint-{step}")
    code = (
        "import resource, sys; from pathlib import Path; import lagless\n"
        "from lagless.posthoc import average_checkpoints, stream_product\n"
        "from lagless.checkpoints import find_checkpoints\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))\n"
        "run, rule = Path(sys.argv[1]) / 'run', lambda i: lagless.EMA(decay=(i + 1) / 400, update_freq=1)\n"
        "average_checkpoints(run, {str(i): rule(i) for i in range(300)}, run.parent / 'out')\n"
        "stream_product(find_checkpoints(run).checkpoints, [1 / 40] * 40, lambda *_: None, workers=8)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), "256"], check=True)


def test_fingerprints_do_not_depend_on_what_is_copied(make_run: Make) -> None:
    from lagless.checkpoints import fingerprint
    from lagless.posthoc import stream_product

    run = make_run([make_state(i) | {"bn.running_var": torch.rand(3)} for i in range(2)])
    found = stream_product(find_checkpoints(run).checkpoints, np.ones(2), lambda *_: None)
    assert found == [fingerprint(path) for path in sorted(run.iterdir())]
