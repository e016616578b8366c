"""Kills, full disks, missing permissions, files that go away: the state stays whole and the watch goes on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.watch.kill_watch import kill
from tests.watch.memory import measure
from tests.watch.test_averages import check_equal
from tests.watch.trainer import save, settle, taken

from lagless.checkpoints import Checkpoint, CheckpointError
from lagless.watch import Settings
from lagless.watch._lock import only_watcher
from lagless.watch._store import BufferFile


def test_killed_at_random_moments_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert kill(6, tmp_path) >= 4


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    began, most = measure(48, None, tmp_path)  # 48 MB per checkpoint, and 6 buffers of as much
    assert most - began < 60, (began, most)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_the_checkpoint_waits(
    tmp_path: Path, watching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    watch, rows = watching()
    save(tmp_path / "run", 10)
    settle(watch)
    for step in (20, 30):
        save(tmp_path / "run", step)
    write = BufferFile.write

    def full(self: BufferFile, name: str, start: int, block: Any) -> None:
        if name == "mlp.weight":
            raise OSError(number, os.strerror(number), str(self.path))
        write(self, name, start, block)

    with monkeypatch.context() as patch:
        patch.setattr(BufferFile, "write", full)
        for _ in range(3):
            assert not watch.step()
    told = [row["text"] for row in rows if row["event"] == "unwritable"]
    assert len(told) == 1 and "the disk is full" in told[0] and "checkpoint-20 waits until there is room" in told[0]
    settle(watch)
    assert taken(watch) == [10, 20, 30]
    check_equal(watch, tmp_path / "run", tmp_path)


def test_metrics_that_cannot_be_written_end_no_watch(
    tmp_path: Path, watching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, rows = watching()
    save(tmp_path / "run", 10)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: 3)
        settle(watch)
    assert taken(watch) == [10] and "No space left" in rows[0]["unwritten"]
    save(tmp_path / "run", 20)
    settle(watch)
    assert [row["step"] for row in watch.metrics.rows()] == [20]


def test_a_last_line_that_a_crash_cut_is_mended(tmp_path: Path, watching: Callable[..., Any]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 1, "name": "live", "loss": 2.0}\n{"step": 2, "na')
    watch, _ = watching()
    save(tmp_path / "run", 10)
    settle(watch)
    assert [row["step"] for row in watch.metrics.rows()] == [1, 10]


def test_a_checkpoint_that_is_removed_while_it_is_read(
    tmp_path: Path, watching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        save(tmp_path / "run", step)
    watch, rows = watching()
    watch.step()
    reader = Checkpoint.reader

    def vanish(self: Checkpoint, name: str, keep_open: bool = True) -> Any:
        shutil.rmtree(tmp_path / "run/checkpoint-20", ignore_errors=True)
        return reader(self, name, keep_open)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "reader", vanish)
        watch.step()
    assert rows[-1]["event"] == "vanished" and "checkpoint-20" in rows[-1]["text"]
    save(tmp_path / "run", 30)
    settle(watch)
    assert taken(watch) == [10, 30]
    check_equal(watch, tmp_path / "run", tmp_path)


def test_a_run_folder_that_cannot_be_read_is_told_and_comes_back(
    tmp_path: Path, watching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, rows = watching()
    assert not watch.step()
    assert "run is not there yet, or not any more: waiting for it" in rows[0]["text"]
    save(tmp_path / "run", 10)
    with monkeypatch.context() as patch:

        def refuse(self: Path) -> Any:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        patch.setattr(Path, "iterdir", refuse)
        assert not watch.step() and not watch.step()
    assert [row["event"] for row in rows] == ["waiting", "unreadable"] and "Permission denied" in rows[1]["text"]
    settle(watch)
    assert taken(watch) == [10]


def test_a_checkpoint_that_may_not_be_read_waits_and_is_named(
    tmp_path: Path, watching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        save(tmp_path / "run", step)
    open_file = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if "checkpoint-20/model" in str(self):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return open_file(self, *arguments, **options)

    watch, rows = watching()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        settle(watch)
    assert taken(watch) == [10]
    assert "checkpoint-20 is not complete" in rows[-1]["text"] and "Permission denied" in rows[-1]["text"]
    settle(watch)
    assert taken(watch) == [10, 20]


def test_an_output_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(Permission denied\)"):
        with only_watcher(tmp_path / "out"):
            pass


@pytest.mark.filterwarnings("ignore:.* minutes before:UserWarning")
def test_clocks_that_jump_do_not_matter(
    tmp_path: Path, watching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of change in the future or the past, and a wall clock that goes back."""
    now, wall = [0.0], [1e9]
    monkeypatch.setattr("time.time", lambda: wall[0])
    watch, _ = watching(settings=Settings(settle=2.0), clock=lambda: now[0])
    for step, stamp in ((10, 4e9), (20, 1.0), (30, 2e9)):
        file = save(tmp_path / "run", step) / "model.safetensors"
        os.utime(file, (stamp, stamp))
        wall[0] -= 1e6
        watch.step()
        assert step not in taken(watch)
        now[0] += 2.0
        settle(watch)
        assert taken(watch)[-1] == step
    check_equal(watch, tmp_path / "run", tmp_path)
