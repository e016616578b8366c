"""Checkpoints are removed only when nobody needs them, and what is kept on disk keeps to its limit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model_files import make_state
from tests.watch.test_averages import check_equal
from tests.watch.trainer import save, settle, taken

from lagless.watch import Settings


def there(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


def test_only_what_is_in_the_oldest_state_goes_and_the_newest_stay(
    tmp_path: Path, watching: Callable[..., Any]
) -> None:
    watch, rows = watching(settings=Settings(settle=0.0, prune=2, keep_states=3))
    for step in range(10, 80, 10):
        save(tmp_path / "run", step)
        save(tmp_path / "all", step)
        settle(watch)
    # States of 50, 60 and 70 are kept: going back to 50 never needs what was removed.
    assert there(tmp_path / "run") == [60, 70] and taken(watch) == list(range(10, 80, 10))
    assert [row["step"] for row in rows if row["event"] == "pruned"] == [10, 20, 30, 40, 50]
    check_equal(watch, tmp_path / "all", tmp_path)
    save(tmp_path / "run", 60, make_state(5))
    shutil.rmtree(tmp_path / "run/checkpoint-70")
    settle(watch)
    assert taken(watch) == [10, 20, 30, 40, 50, 60]


def test_nothing_goes_that_was_left_out_or_changed_or_that_the_run_names(
    tmp_path: Path, watching: Callable[..., Any]
) -> None:
    bad = make_state(20)
    bad["mlp.weight"][0, 0] = torch.nan
    for step in range(10, 70, 10):
        save(tmp_path / "run", step, bad if step == 20 else None)
    (tmp_path / "run/latest").write_text("checkpoint-30\n")
    state = {"best_model_checkpoint": "/elsewhere/checkpoint-40"}
    (tmp_path / "run/checkpoint-60/trainer_state.json").write_text(json.dumps(state))
    watch, _ = watching(settings=Settings(settle=0.0, prune=1, keep_states=1))
    settle(watch)
    assert there(tmp_path / "run") == [20, 30, 40, 60]


def test_a_dry_run_lists(tmp_path: Path, watching: Callable[..., Any]) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path / "run", step)
    watch, rows = watching(settings=Settings(settle=0.0, prune=1, prune_dry=True))
    settle(watch)
    settle(watch)
    assert there(tmp_path / "run") == [10, 20, 30, 40]
    assert [row["step"] for row in rows if row["event"] == "would prune"] == [10, 20, 30]


def test_the_state_is_on_the_disk_before_anything_goes(
    tmp_path: Path, watching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, rename = os.replace, os.rename

    def note_sync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def note_replace(one: Any, other: Any) -> None:
        done.append(f"replace {Path(other).name}")
        replace(one, other)

    def note_rename(one: Any, other: Any) -> None:
        done.append(f"rename {Path(one).name}")
        rename(one, other)

    for step in (10, 20):
        save(tmp_path / "run", step)
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(os, "rename", note_rename)
    watch, _ = watching(settings=Settings(settle=0.0, prune=1, keep_states=1))
    settle(watch)
    buffers = {file for generation in watch.averages.record.generations for file in generation.files}
    last = len(done) - 1 - done[::-1].index("replace state.json")
    assert all(f"sync {file}" in done[:last] for file in buffers)
    assert done[last - 1].startswith("sync .state.json") and "sync state" in done[last:]
    assert done.index("rename checkpoint-10") > last


def test_a_removal_that_was_interrupted_is_completed(tmp_path: Path, watching: Callable[..., Any]) -> None:
    save(tmp_path / "run", 10).rename(tmp_path / "run/.lagless-pruned-checkpoint-5")
    watching(settings=Settings(settle=0.0, prune=1))
    assert list((tmp_path / "run").iterdir()) == []


def test_what_may_not_be_removed_is_told_once(
    tmp_path: Path, watching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        save(tmp_path / "run", step)
    watch, rows = watching(settings=Settings(settle=0.0, prune=1, keep_states=1))

    def refuse(path: Any, *arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    while taken(watch) != [10, 20, 30]:
        watch.step()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        for _ in range(3):
            watch.step()
    texts = [row["text"] for row in rows if row["event"] == "not pruned"]
    assert texts == [f"checkpoint-{step} could not be removed (Permission denied)" for step in (10, 20)]


def test_the_limit_on_disk(tmp_path: Path, watching: Callable[..., Any]) -> None:
    for step in range(10, 60, 10):
        save(tmp_path / "run", step)
    watch, rows = watching(settings=Settings(settle=0.0, keep_states=9, keep=3, max_disk=250_000))
    settle(watch)
    assert taken(watch) == [10, 20, 30, 40, 50]
    assert [row["event"] for row in rows].count("spared") == 1
    assert len(watch.models.kept) == 1 and len(watch.averages.record.generations) == 1
    watch.__exit__(None, None, None)
    save(tmp_path / "run", 60)
    watch, rows = watching(settings=Settings(settle=0.0, max_disk=1000))
    settle(watch)
    assert taken(watch)[-1] == 50 and "more than --max-disk 1,000" in rows[-1]["text"]


def test_one_checkpoint_stays_at_least() -> None:
    with pytest.raises(ValueError, match="--prune-keep 0: at least 1"):
        Settings(prune=0)
