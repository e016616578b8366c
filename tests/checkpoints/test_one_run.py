"""Checkpoints of one run, each once, with nothing of them left out."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model_files import make_state, save_model

from lagless import EMA, Averager
from lagless.checkpoints import CheckpointError, find_checkpoints, open_checkpoint
from lagless.posthoc import average_checkpoints

Make = Callable[..., Path]


def log(folder: Path, entries: Any) -> None:
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


def losses(last: int, run: float) -> list[dict[str, float]]:
    entries = [{"step": step, "loss": run + step} for step in range(5, last + 1, 5)]
    return [*entries, {"step": last, "eval_loss": 7.0}, {"step": last, "train_runtime": run}]


def test_logs_of_two_runs_are_refused(make_run: Make) -> None:
    run = make_run([make_state(i) for i in range(4)])
    for step, number in ((10, 2.0), (20, 2.0), (30, 1.0), (40, 1.0)):
        log(run / f"checkpoint-{step}", losses(step, number))
    with pytest.raises(CheckpointError, match="checkpoint-20 and .*checkpoint-30 are of two runs: at step 5 .* loss 7"):
        find_checkpoints(run)
    assert find_checkpoints(run, steps=[30, 40]).steps == (30, 40)


def test_logs_of_one_run_agree_also_where_a_loss_is_nan(make_run: Make) -> None:
    run = make_run([make_state(i) for i in range(2)])
    for step in (10, 20):
        log(run / f"checkpoint-{step}", [{"step": 5, "loss": float("nan")}, *losses(step, 1.0)])
    assert find_checkpoints(run).steps == (10, 20)


@pytest.mark.parametrize(
    "content", [3, None, {"log_history": 3}, {"log_history": [1, None, {"step": "a", "loss": []}]}]
)
def test_logs_of_other_types_say_nothing(make_run: Make, content: Any) -> None:
    run = make_run([make_state(i) for i in range(2)])
    for checkpoint in run.iterdir():
        (checkpoint / "trainer_state.json").write_text(json.dumps(content))
    assert find_checkpoints(run).steps == (10, 20)


def age(folder: Path, seconds: float) -> None:
    stat = folder.stat()
    for file in folder.iterdir():
        os.utime(file, (stat.st_mtime - seconds, stat.st_mtime - seconds))


def test_later_checkpoints_of_an_older_run_are_warned_of(make_run: Make) -> None:
    run = make_run([make_state(i) for i in range(4)])
    for step in (30, 40):
        age(run / f"checkpoint-{step}", 7200)
    with pytest.warns(
        UserWarning, match="checkpoint-30 was written 120 minutes before .*checkpoint-20.*leave out"
    ) as told:
        find_checkpoints(run)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_checkpoints(run, steps=[30, 40])
        for checkpoint in run.iterdir():  # a copy: the log shows that all are of one run
            log(checkpoint, losses(int(checkpoint.name[-2:]), 1.0))
        find_checkpoints(run)


@pytest.mark.parametrize("how", ["folder", "file", "hard"])
def test_a_checkpoint_that_is_linked_counts_once(make_run: Make, how: str) -> None:
    run = make_run([make_state(i) for i in range(2)])
    if how == "folder":
        (run / "checkpoint-30").symlink_to(run / "checkpoint-20")
    else:
        (run / "checkpoint-30").mkdir()
        link = os.link if how == "hard" else os.symlink
        link(run / "checkpoint-20/model.safetensors", run / "checkpoint-30/model.safetensors")
    with pytest.raises(CheckpointError, match="checkpoint-30 and .*checkpoint-20 are the same files .*count twice"):
        find_checkpoints(run)
    with pytest.raises(CheckpointError, match="are the same files"):
        find_checkpoints([run / "checkpoint-20"], start=run / "checkpoint-30")


def test_a_copy_of_a_checkpoint_is_warned_of(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in (0, 1, 1)])
    with pytest.warns(UserWarning, match="checkpoint-20 and .*checkpoint-30 hold the same weights, bit for bit"):
        average_checkpoints(run, EMA(decay=0.5), tmp_path / "out")
    average_checkpoints(make_run([make_state(i) for i in (0, 0, 1)], name="b"), EMA(decay=0.5), tmp_path / "b-out")


@pytest.mark.parametrize("rules", [EMA(decay=0.5), {"x": EMA(decay=0.5)}])
def test_averages_inside_of_the_run_are_no_checkpoints(make_run: Make, tmp_path: Path, rules: Any) -> None:
    run = make_run([make_state(i) for i in range(2)])
    average_checkpoints(run, rules, run / "checkpoint-90")
    assert find_checkpoints(run).steps == (10, 20)


def test_states_of_averagers_are_no_models(tmp_path: Path) -> None:
    averager = Averager(torch.nn.Linear(3, 3), EMA(decay=0.5))
    averager.update()
    averager.save(tmp_path / "averages.safetensors")
    with pytest.raises(CheckpointError, match="is the state of an Averager, not a model"):
        open_checkpoint(tmp_path / "averages.safetensors")


MATRIX = {"w": torch.randn(3, 3)}
SPARE = {
    "dense layer": ("2_Dense/model.safetensors", MATRIX),
    "second adapter": ("second/adapter_model.safetensors", MATRIX),
    "pipeline": ("unet/diffusion_pytorch_model.safetensors", MATRIX),
    "beside": ("ema.safetensors", MATRIX),
    "torch": ("value_head.pt", MATRIX),
    "deep": ("a/b/c/weights.bin", {"state_dict": MATRIX}),
}


@pytest.mark.parametrize("case", SPARE)
def test_weights_that_would_be_left_out_are_refused(make_run: Make, case: str) -> None:
    run, (name, state) = make_run([make_state(i) for i in range(2)]), SPARE[case]
    for folder in run.iterdir():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / name) if name.endswith("safetensors") else torch.save(state, folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: holds weights that would be left out beside model.safetensors"):
        find_checkpoints(run)
    assert find_checkpoints([folder / "model.safetensors" for folder in run.iterdir()]).steps == (10, 20)


def test_states_and_other_formats_are_no_weights_left_out(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(2)])
    averager = Averager(torch.nn.Linear(3, 3), EMA(decay=0.5))
    averager.update()
    for folder in run.iterdir():
        averager.save(folder / "averages.safetensors")
        torch.save({"state": {0: {"exp_avg": torch.ones(3, 3)}}}, folder / "optimizer.bin")
        torch.save({"exp_avg": torch.ones(3, 3)}, folder / "states.pt")
        torch.save(MATRIX, folder / "pytorch_model.bin")
        (folder / "rng.pth").write_bytes(b"x")
        (folder / "global_step10").mkdir()
        torch.save(MATRIX, folder / "global_step10/mp_rank_00_model_states.pt")
    average_checkpoints(run, EMA(decay=0.5), run / "checkpoint-10" / "average", steps=[10, 20])
    assert find_checkpoints(run).steps == (10, 20)


def test_a_start_may_hold_more_than_the_run(make_run: Make, tmp_path: Path) -> None:
    run, base = make_run([make_state(i) for i in range(2)]), make_state(9)
    save_model(base | {"mtp.0.weight": torch.randn(4, 4), "lm_head.weight": torch.ones(2)}, tmp_path / "base")
    (tmp_path / "base" / "original").mkdir()
    torch.save(MATRIX, tmp_path / "base/original/consolidated.00.pth")
    average_checkpoints(run, EMA(decay=0.5), tmp_path / "out", start=tmp_path / "base")
    states = [base, *(load_file(run / f"checkpoint-{step}/model.safetensors") for step in (10, 20))]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == base.keys()
    wanted = sum(weight * state["mlp.weight"] for weight, state in zip((0.25, 0.25, 0.5), states, strict=True))
    assert torch.allclose(found["mlp.weight"], torch.as_tensor(wanted), atol=1e-6)


def test_a_start_whose_names_differ_is_told_how_that_comes(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(2)])
    save_model({f"language_model.{name}": tensor for name, tensor in make_state(0).items()}, tmp_path / "base")
    message = "base lacks 7 of the 7 tensors .* it has 'language_model.embed.weight', .*another version of transformers"
    with pytest.raises(CheckpointError, match=message):
        find_checkpoints(run, start=tmp_path / "base")


def test_paths_are_absolute_and_know_the_home_folder(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run([make_state(i) for i in range(2)])
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(make_state(5), tmp_path / "base")
    summaries = average_checkpoints("~/run", EMA(decay=0.5), "~/out", start="~/base")
    assert summaries[0].path == tmp_path / "out" and (tmp_path / "out/model.safetensors").exists()
    assert find_checkpoints(["~/run/checkpoint-10", "~/run/checkpoint-20"]).steps == (10, 20)
    monkeypatch.chdir(run)
    found = find_checkpoints(".", start="../base")
    monkeypatch.chdir("/")
    assert torch.equal(found.checkpoints[0].read_tensor("mlp.weight"), make_state(5)["mlp.weight"])
