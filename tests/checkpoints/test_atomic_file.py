"""Files that are there whole or not at all, and leftovers of those that were killed while they wrote them."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lagless import EMA, Averager
from lagless.checkpoints import _atomic_file, _owners, atomic_file
from lagless.checkpoints._owners import Owner


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_an_error_keeps_the_former_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.json").read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_what_a_dead_owner_left_goes_and_all_else_stays(tmp_path: Path) -> None:
    owner = Owner.new()
    stays = [".a.json.partial", f".a.json.bak.{owner}.partial", f".b.json.{owner}.partial", ".a.json.0123abcd.partial"]
    for name in (*stays, f".a.json.{owner}.partial"):
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "a.json") as outer:
        outer.write_text("outer")
        with atomic_file(tmp_path / "a.json") as inner:
            inner.write_text("inner")
        assert outer.read_text() == "outer"
    assert (tmp_path / "a.json").read_text() == "outer"
    assert names(tmp_path) == sorted([*stays, "a.json"])


def test_another_machines_file_stays_while_it_is_written(tmp_path: Path) -> None:
    left = tmp_path / f".a.{replace(Owner.new(), boot='0' * 8)}.partial"
    left.touch()
    for age, there in ((0, True), (7200, False)):
        changed = left.stat().st_mtime - age
        os.utime(left, (changed, changed))
        with atomic_file(tmp_path / "a"):
            pass
        assert left.exists() == there


def test_a_file_taken_for_a_dead_owners_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = _owners._lock, []

    def late(descriptor: int) -> object:
        if not taken:
            (left,) = tmp_path.iterdir()
            taken.append(left.name)
            left.unlink()
        return lock(descriptor)

    monkeypatch.setattr(_owners, "_lock", late)
    with atomic_file(tmp_path / "a") as partial:
        partial.write_text("x")
        assert partial.name not in taken
    assert names(tmp_path) == ["a"]


def test_permissions_are_those_of_new_files_or_fewer(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for mode, expected in ((None, 0o644), (0o600, 0o600), (0o444, 0o644), (0o777, 0o644)):
            if mode is not None:
                (tmp_path / "a").chmod(mode)
            with atomic_file(tmp_path / "a") as partial:
                partial.write_text("x")
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == expected
    finally:
        os.umask(before)


def test_contents_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    replace_, sync = os.replace, _atomic_file.sync
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), replace_(*paths)))
    monkeypatch.setattr(_atomic_file, "sync", lambda path: (events.append(path), sync(path)))
    with atomic_file(tmp_path / "a") as partial:
        partial.write_text("x")
    assert events == [partial, "renamed", tmp_path]


def test_a_state_is_saved_through_it(tmp_path: Path) -> None:
    averager, path = Averager({"w": torch.ones(3)}, EMA(decay=0.5)), tmp_path / "deep" / "state.safetensors"
    averager.save(path)
    (path.parent / f".{path.name}.{Owner.new()}.partial").write_bytes(b"half")
    path.chmod(0o600)
    averager.save(path)
    assert names(path.parent) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says when a process started")
def test_an_owner_is_told_by_its_name() -> None:
    owner = Owner.new()
    assert Owner.parse(str(owner)) == owner and owner.pid == os.getpid() and owner.started > 0
    assert not owner.has_ended() and replace(owner, started=owner.started + 1).has_ended()
    for text in ("", "a" * 8, f"{owner}x/", f"x{owner}", str(owner).replace("-", "_")):
        assert Owner.parse(text) is None
