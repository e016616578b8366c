"""Wherever a path is taken, ``~`` is the home folder, and never a new folder of that name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model_files import make_state, save_model

import lagless
from lagless import EMA, Averager
from lagless.checkpoints import find_checkpoints, fingerprint, open_checkpoint
from lagless.integrations.distributed import export_model
from lagless.posthoc import average_checkpoints, combine_checkpoints, inspect_run

RULE = EMA(decay=0.5)


def averager(**options: Any) -> Averager:
    made = Averager({"w": torch.ones(3)}, {"ema": EMA(decay=0.5)}, **options)
    made.update()
    return made


def export() -> None:
    model = torch.nn.Linear(2, 2)
    followed = Averager(model, RULE)
    followed.update()
    export_model(followed, model, "~/exported")


CALLS: dict[str, Callable[[], object]] = {
    "find_checkpoints": lambda: find_checkpoints("~/run", start="~/base"),
    "a list": lambda: find_checkpoints(["~/run/checkpoint-1", "~/run/checkpoint-2"]),
    "inspect_run": lambda: inspect_run("~/run"),
    "open_checkpoint": lambda: open_checkpoint("~/base"),
    "fingerprint": lambda: fingerprint("~/base"),
    "combine_checkpoints": lambda: combine_checkpoints(["~/run/checkpoint-1", "~/run/checkpoint-2"], [0.5, 0.5]),
    "average_checkpoints": lambda: average_checkpoints("~/run", RULE, "~/averaged"),
    "save and load": lambda: (averager().save("~/deep/state.safetensors"), averager().load("~/deep/state.safetensors")),
    "start": lambda: averager(start="~/linear").read("ema"),
    "export_model": export,
}
MADE = {"average_checkpoints": "averaged", "save and load": "deep", "export_model": "exported"}


@pytest.mark.parametrize("name", CALLS)
def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in (1, 2):
        save_model(make_state(step), home / f"run/checkpoint-{step}")
    save_model(make_state(0), home / "base")
    save_model({"w": torch.ones(3)}, home / "linear")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    CALLS[name]()
    assert not list(elsewhere.iterdir())
    assert name not in MADE or (home / MADE[name]).is_dir()


def test_a_relative_start_keeps_its_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model({"w": torch.ones(3)}, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    live = {"w": torch.ones(3)}
    followed = Averager(live, lagless.BEMA(update_freq=1), start="base")
    live["w"].add_(1.0)
    followed.update()
    monkeypatch.chdir("/")
    assert torch.isfinite(followed.read()["w"]).all()
