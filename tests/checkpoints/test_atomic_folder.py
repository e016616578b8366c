"""Output folders: nothing that came while the work went on is destroyed, and of two runs one wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from lagless.checkpoints import RECORD, CheckpointError, Destination, _atomic_folder


@pytest.fixture(params=["exchange", "two steps"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "two steps":
        monkeypatch.setattr(_atomic_folder, "exchange", lambda *_: False)
    return tmp_path / "out"


def _write(out: Path, text: str) -> None:
    with Destination(out) as temporary:
        (temporary / RECORD).write_text(text)


def _only_out(out: Path) -> bool:
    return [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_an_earlier_folder_is_replaced(out: Path) -> None:
    _write(out, "old")
    _write(out, "new")
    assert (out / RECORD).read_text() == "new"
    assert _only_out(out)


def test_a_folder_that_appears_meanwhile_stays(out: Path) -> None:
    with pytest.raises(CheckpointError, match="lagless did not write it"), Destination(out) as temporary:
        (temporary / RECORD).write_text("new")
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    assert [(entry.name, entry.read_text()) for entry in out.iterdir()] == [("thesis.txt", "mine")]
    assert _only_out(out)


def test_a_file_that_appears_meanwhile_stays(out: Path) -> None:
    with pytest.raises(CheckpointError, match="changed"), Destination(out):
        out.write_text("mine")
    assert out.read_text() == "mine"
    assert _only_out(out)


@pytest.mark.parametrize("change", ["added", "nested", "edited"])
def test_files_that_change_in_the_folder_to_be_replaced_stay(out: Path, change: str) -> None:
    _write(out, "old")
    (out / "deep").mkdir()
    file = out / {"added": "mine.txt", "nested": "deep/mine.txt", "edited": RECORD}[change]
    with pytest.raises(CheckpointError, match="changed while"), Destination(out) as temporary:
        (temporary / RECORD).write_text("new")
        file.write_text("this is mine")
    assert file.read_text() == "this is mine"
    assert _only_out(out)


def test_of_two_runs_to_one_new_folder_one_wins(out: Path) -> None:
    with pytest.raises(CheckpointError, match="another run of lagless wrote it"), Destination(out) as temporary:
        (temporary / RECORD).write_text("slower")
        _write(out, "faster")
    assert (out / RECORD).read_text() == "faster"
    assert _only_out(out)
