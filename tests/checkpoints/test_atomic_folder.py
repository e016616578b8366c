"""Output folders: nothing that came while the work went on is destroyed, and of two runs one wins."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lagless.checkpoints import (
    RECORD,
    CheckpointError,
    _atomic_folder,
    _durability,
    _leftovers,
    _owners,
    atomic_folder,
    check_destination,
)
from lagless.checkpoints._leftovers import beside
from lagless.checkpoints._owners import Owner
from lagless.checkpoints._permissions import Permissions


@pytest.fixture(params=["exchange", "two steps"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "two steps":
        monkeypatch.setattr(_atomic_folder, "exchange", lambda *_: False)
    return tmp_path / "out"


def _write(out: Path, text: str) -> None:
    with atomic_folder(out) as temporary:
        (temporary / "text").write_text(text)


def _only_out(out: Path) -> bool:
    return [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_an_earlier_folder_is_replaced(out: Path) -> None:
    _write(out, "old")
    _write(out, "new")
    assert (out / "text").read_text() == "new"
    assert _only_out(out)


def test_a_folder_that_appears_meanwhile_stays(out: Path) -> None:
    with pytest.raises(CheckpointError, match="lagless did not write it"), atomic_folder(out) as temporary:
        (temporary / "text").write_text("new")
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    assert [(entry.name, entry.read_text()) for entry in out.iterdir()] == [("thesis.txt", "mine")]
    assert _only_out(out)


def test_a_file_that_appears_meanwhile_stays(out: Path) -> None:
    with pytest.raises(CheckpointError, match="changed"), atomic_folder(out):
        out.write_text("mine")
    assert out.read_text() == "mine"
    assert _only_out(out)


@pytest.mark.parametrize("change", ["added", "nested", "edited"])
def test_files_that_change_in_the_folder_to_be_replaced_stay(out: Path, change: str) -> None:
    with atomic_folder(out) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "text").write_text("old")
    file = out / {"added": "mine.txt", "nested": "deep/mine.txt", "edited": "deep/text"}[change]
    with pytest.raises(CheckpointError, match="changed while"), atomic_folder(out) as temporary:
        (temporary / "text").write_text("new")
        file.write_text("this is mine")
    assert file.read_text() == "this is mine"
    assert _only_out(out)


def test_of_two_runs_to_one_new_folder_one_wins(out: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=rf"another run of lagless \(process {os.getpid()} on"),
        atomic_folder(out) as temporary,
    ):
        (temporary / "text").write_text("slower")
        _write(out, "faster")
    assert (out / "text").read_text() == "faster"
    assert _only_out(out)


def test_a_winner_that_has_ended_is_named(out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lagless \(process 17 on elsewhere\) wrote it"), atomic_folder(out):
        (lock,) = out.parent.glob(".out.lock-*")
        lock.write_text("process 17 on elsewhere\n")
        out.mkdir()
        (out / RECORD).write_text("{}")


def test_files_that_appear_between_the_check_and_the_exchange_stay(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(out, "old")
    exchange = _atomic_folder.exchange

    def too_late(one: Path, other: Path) -> bool:
        if (other / "text").read_text() == "old":
            (other / "mine.txt").write_text("mine")
        return exchange(one, other)

    monkeypatch.setattr(_atomic_folder, "exchange", too_late)
    with pytest.raises(CheckpointError, match="files in it are not those that were there at the start"):
        _write(out, "new")
    assert (out / "mine.txt").read_text() == "mine" and (out / "text").read_text() == "old"
    assert _only_out(out)


def test_files_that_appear_after_the_last_check_are_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(out, "old")
    remove = _leftovers.remove_own_files

    def too_late(old: Path) -> bool:
        (old / "mine.txt").write_text("mine")
        return remove(old)

    monkeypatch.setattr(_leftovers, "remove_own_files", too_late)
    with pytest.warns(UserWarning, match=r"out\.kept-.*: holds mine.txt, which was at .*out while"):
        _write(out, "new")
    assert (out / "text").read_text() == "new"
    (kept,) = out.parent.glob("out.kept-*")
    assert [(entry.name, entry.read_text()) for entry in kept.iterdir()] == [("mine.txt", "mine")]


# Leftovers of killed runs


def _leave(out: Path, owner: Owner, former: bool = False, unfinished: bool = True) -> None:
    """What a run leaves that is killed while it writes, or before or after the second of two renames."""
    if former:
        _write(out, "old")
        out.rename(beside(out, "old", owner))
    beside(out, "lock", owner).touch()
    if unfinished:
        beside(out, "tmp", owner).mkdir()
        (beside(out, "tmp", owner) / "half").touch()


@pytest.mark.parametrize("name", ["out", "[a-z]*?", "x" * 250, "ä" * 120])
def test_the_next_run_removes_what_a_dead_one_left(tmp_path: Path, name: str) -> None:
    out, owner = tmp_path / name, Owner.new()
    _leave(out, owner)
    others = tmp_path / ".out.tmp-0123abcd", tmp_path / f".{name[:9]}x.tmp-{owner}"
    for other in others:
        other.mkdir()
    _write(out, "new")
    assert set(tmp_path.iterdir()) == {out, *others}


def test_what_a_live_run_holds_stays(out: Path) -> None:
    with atomic_folder(out) as temporary:
        (temporary / "text").write_text("of the live one")
        with pytest.raises(RuntimeError), atomic_folder(out):
            raise RuntimeError
        assert (temporary / "text").read_text() == "of the live one"
    assert (out / "text").is_file() and _only_out(out)


def test_what_another_machine_writes_stays_until_it_is_quiet_for_an_hour(out: Path) -> None:
    owner = replace(Owner.new(), boot="0" * 8, host="elsewhere")
    _leave(out, owner)
    _write(out, "one")
    assert len(list(out.parent.iterdir())) == 3
    os.utime(beside(out, "lock", owner), (0, 0))
    _write(out, "two")  # a file in the folder is new
    assert len(list(out.parent.iterdir())) == 3
    os.utime(beside(out, "tmp", owner) / "half", (0, 0))
    _write(out, "three")
    assert _only_out(out)


@pytest.mark.parametrize(
    "changes, ended",
    [
        ({}, False),
        ({"pid": 2**22 + 1}, True),
        ({"started": 1}, True),
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),
        ({"boot": "0" * 8, "pid": 2**22 + 1}, False),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says when a process started")
def test_without_locks_only_processes_of_this_machine_are_known_to_have_ended(
    out: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], ended: bool
) -> None:
    monkeypatch.setattr(_owners, "_lock", lambda _: _owners._Lock.UNSUPPORTED)
    owner = replace(Owner.new(), **changes)
    assert Owner.parse(str(owner)) == owner
    _leave(out, owner)
    _write(out, "new")
    assert _only_out(out) == ended


def test_a_run_killed_between_two_renames_is_made_good(out: Path) -> None:
    _leave(out, Owner.new(), former=True)
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(out, overwrite=False):
        raise AssertionError("begun")
    assert (out / "text").read_text() == "old"
    assert _only_out(out)


def test_the_former_folder_of_a_killed_run_goes_only_when_it_was_replaced(out: Path) -> None:
    owner = Owner.new()
    _leave(out, owner, former=True)
    _write(out.parent / "new", "new")
    (out.parent / "new").rename(out)
    with pytest.warns(UserWarning, match="out.kept-.*: holds an earlier result"):
        _write(out, "newer")  # both are there: what is at out came from elsewhere
    assert len(list(out.parent.glob("out.kept-*/text"))) == 1
    _leave(out.parent / "other", owner, former=True, unfinished=False)
    _write(out.parent / "new", "new")
    (out.parent / "new").rename(out.parent / "other")
    _write(out.parent / "other", "newer")
    assert sorted(entry.name for entry in out.parent.iterdir() if entry.name.startswith(".")) == []


def test_what_came_into_the_former_folder_of_a_killed_run_is_kept(out: Path) -> None:
    owner = Owner.new()
    _leave(out, owner, former=True, unfinished=False)
    (beside(out, "old", owner) / "mine.txt").write_text("mine")
    out.mkdir()
    with pytest.warns(UserWarning, match="holds mine.txt"):
        _write(out, "new")
    (kept,) = out.parent.glob("out.kept-*")
    assert (kept / "mine.txt").read_text() == "mine"


def test_files_reach_the_disk_before_the_folder_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for owner, name in ((_durability, "sync"), (_atomic_folder, "sync"), (os, "rename")):
        call = getattr(owner, name)

        def noted(path: Path, *more: Path, call: Callable[..., None] = call) -> None:
            events.append(f"{path.name[:8]}{' renamed' * len(more)}")
            call(path, *more)

        monkeypatch.setattr(owner, name, noted)
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "text").touch()
    assert events == ["text", "deep", "lagless.", ".out.tmp", ".out.tmp renamed", tmp_path.name[:8]]


# Permissions


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_nobody_sees_more_than_before(out: Path) -> None:
    for allowed, expected in ((0o777, (0o640, 0o750)), (0o700, (0o600, 0o700)), (0o055, (0o640, 0o700))):
        with atomic_folder(out, permissions=Permissions(allowed, allowed)) as temporary:
            assert _mode(temporary) == 0o700  # while it is written
            (temporary / "text").touch()
        assert (_mode(out / RECORD), _mode(out)) == expected  # the last time because what is replaced was private


def test_names_too_long_and_places_without_permission_are_told(tmp_path: Path) -> None:
    for out in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "out"):
        with pytest.raises(CheckpointError, match="File name too long"), atomic_folder(out):
            raise AssertionError("begun")
        with pytest.raises(CheckpointError, match="File name too long"):
            check_destination(out, [tmp_path], overwrite=True)
    assert list(tmp_path.iterdir()) == []
