"""Averages of a run evaluated in memory."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lagless import BEMA, EMA, trajectory_weights
from lagless.checkpoints import CheckpointError, find_checkpoints
from lagless.lab import averages
from lagless.lab.averages import evaluate_averages
from lagless.posthoc import average_checkpoints

STEPS = [0, 10, 20, 30, 40, 50, 60]
RULES = {"bema": BEMA.paper(update_freq=10), "ema": EMA(ema_power=0.2, update_freq=10)}


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_they_are_the_averages_that_would_be_written(run, tmp_path):
    found = {e.name: e for e in evaluate_averages(run, RULES, weights_of)}
    assert list(found) == ["live", "bema", "ema"]
    average_checkpoints(run, RULES, tmp_path / "out")
    for name in RULES:
        written = load_file(tmp_path / "out" / name / "model.safetensors")
        for tensor in written:
            torch.testing.assert_close(found[name].result[tensor], written[tensor], rtol=0, atol=1e-6)
        assert torch.equal(found[name].result["lm_head.weight"], found[name].result["model.embed_tokens.weight"])
        assert found[name].weights == tuple(trajectory_weights(RULES[name], STEPS))
    live = load_file(run / "checkpoint-60" / "model.safetensors")
    assert all(torch.equal(found["live"].result[name], live[name]) for name in live)


@pytest.mark.parametrize("models", [1, 3, 7, 1000])
def test_memory_changes_nothing_but_how_often_files_are_read(run, models, monkeypatch):
    trajectory, calls = find_checkpoints(run), []
    size = sum(4 * info.numel for info in trajectory.checkpoints[-1].tensors.values())
    combine = averages.combine_checkpoints

    def counted(checkpoints, weights, **options):
        calls.append(len(weights))
        return combine(checkpoints, weights, **(options | {"memory": 2**24}))

    monkeypatch.setattr(averages, "combine_checkpoints", counted)
    found = list(evaluate_averages(trajectory, RULES, weights_of, at=[40, 50, 60], memory=models * size))
    assert calls == {1: [1] * 9, 3: [3] * 3, 7: [7], 1000: [9]}[models]
    assert [(e.name, e.step) for e in found] == [(n, t) for t in (40, 50, 60) for n in ("live", "bema", "ema")]
    states = [load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in STEPS]
    for each in found:
        if each.name in RULES:
            assert each.weights == tuple(trajectory_weights(RULES[each.name], STEPS, at=each.step))
        for name in states[0]:
            expected = sum(w * state[name].double() for w, state in zip(each.weights, states, strict=True))
            torch.testing.assert_close(each.result[name].double(), expected, rtol=0, atol=2e-6)


def test_every_file_is_read_once_for_a_grid(run):
    grid = {str(k): BEMA.paper(ema_power=k, update_freq=10) for k in np.linspace(0.1, 0.9, 20)}
    done = []
    assert len(list(evaluate_averages(run, grid, lambda m: None, progress=lambda *read: done.append(read)))) == 21
    read, in_all = done[-1]
    assert read == in_all == sum(c.nbytes for c in find_checkpoints(run).checkpoints)
    assert [bytes_ for bytes_, _ in done] == sorted(bytes_ for bytes_, _ in done)


def test_nothing_is_written(run):
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    list(evaluate_averages(run, RULES, lambda m: None))
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_what_does_not_fit_is_refused(run, tokenizer):
    with pytest.raises(ValueError, match="at=35: the run has checkpoints at 0, 10"):
        list(evaluate_averages(run, RULES, weights_of, at=[35]))
    with pytest.raises(ValueError, match="the mapping is empty"):
        list(evaluate_averages(run, {}, weights_of, live=False))
    with pytest.raises(CheckpointError, match="the checkpoints do not fit the model: 'weight' is only in the model"):
        list(evaluate_averages(run, RULES, weights_of, model=torch.nn.Linear(2, 2)))
