"""Files that lagless wrote are on a list, and nothing else is removed."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from lagless.checkpoints import (
    RECORD,
    CheckpointError,
    atomic_folder,
    check_destination,
    find_checkpoints,
    remove_own_files,
)
from lagless.checkpoints._contents import foreign_files, records_average

NAMES = st.sampled_from(["config.json", "model.safetensors", "a", "b", "ä b", ".hidden", "lagless.json.bak"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
OWN = {"config.json": "{}", "model.safetensors": "weights", "deep/er/a": "x"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def files_in(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def add(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """Write what fits between the files there; return what was written."""
    written = {}
    for name, text in files.items():
        path = folder / name
        if not path.exists() and not any(parent.is_file() for parent in path.parents):
            write(folder, {name: text})
            written[name] = text
    return written


@settings(max_examples=60, deadline=None)
@given(
    own=st.dictionaries(PATHS, st.text("abé", max_size=5), max_size=5),
    foreign=st.dictionaries(PATHS, st.text("abé", max_size=5), max_size=5),
    inner=st.booleans(),
)
def test_whatever_else_is_in_a_folder_is_noticed_and_stays(
    own: dict[str, str], foreign: dict[str, str], inner: bool
) -> None:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        with atomic_folder(out) as temporary:
            add(temporary, own)
            if inner:
                with atomic_folder(temporary / "inner") as deeper:
                    add(deeper, own)
        assert foreign_files(out) == []
        added = add(out, foreign)
        found = [Path(name).as_posix() for name in foreign_files(out)]
        assert found == sorted(added)
        if added:
            before = files_in(out)
            with pytest.raises(CheckpointError, match="lagless did not write"), atomic_folder(out):
                raise AssertionError("begun")
            assert files_in(out) == before
        assert remove_own_files(out) == (not added)
        assert (files_in(out) if out.exists() else {}) == added


@pytest.mark.parametrize(
    "change", ["grown", "link", "link of that size", "linked folder", "empty folder", "record of its own"]
)
def test_what_is_no_listed_file_counts_as_foreign(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as temporary:
        write(temporary, OWN)
    stranger = "mine"
    if change == "grown":
        stranger = "config.json"
        (out / stranger).write_text('{"by hand": true}')
    elif change == "link":
        (out / stranger).symlink_to(out / "config.json")
    elif change == "link of that size":
        stranger = "config.json"
        (out / stranger).unlink()
        (out / stranger).symlink_to("to")
    elif change == "linked folder":
        (tmp_path / "elsewhere").mkdir()
        (out / stranger).symlink_to(tmp_path / "elsewhere")
    elif change == "empty folder":
        (out / stranger).mkdir()
    else:  # another average, which the outer record does not know
        with atomic_folder(out / "sub") as temporary:
            write(temporary, {"x": ""})
        stranger = os.path.join("sub", RECORD)
    assert foreign_files(out)[0] == stranger
    with pytest.raises(CheckpointError, match=rf"lagless did not write {stranger}.*Move"):
        check_destination(out, [], overwrite=True)
    assert not remove_own_files(out)
    assert os.path.lexists(out / stranger)
    assert not (out / "model.safetensors").exists()


def test_up_to_three_foreign_files_are_named(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out"):
        pass
    write(tmp_path / "out", dict.fromkeys("edcba", ""))
    with pytest.raises(CheckpointError, match="did not write a, b, c and 2 more in it.*Move them away, or choose"):
        check_destination(tmp_path / "out", [], overwrite=True)


def test_a_folder_in_a_folder_can_be_replaced_by_itself(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as temporary:
        for name in ("a", "b"):
            write(temporary / name, {RECORD: json.dumps({"rule": name}), "model.safetensors": "weights"})
    with atomic_folder(tmp_path / "out" / "a") as temporary:
        write(temporary, {"model.safetensors": "other weights"})
    check_destination(tmp_path / "out", [], overwrite=True)
    record = json.loads((tmp_path / "out" / "b" / RECORD).read_text())
    assert record == {"rule": "b", "files": {"model.safetensors": 7}}
    assert remove_own_files(tmp_path / "out")


@pytest.mark.parametrize("record", ["", "{}", "[]", '{"files": 3}', '{"lagless": "0.1.0"}', "[" * 100_000])
def test_a_record_without_a_list_counts_for_the_files_of_a_model(tmp_path: Path, record: str) -> None:
    shards = "model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
    known = dict.fromkeys([*OWN, *shards, "chat_template.jinja", "head/model.safetensors"], "x")
    del known["deep/er/a"]
    write(tmp_path / "out", known | {RECORD: record})
    assert foreign_files(tmp_path / "out") == []
    write(tmp_path / "out", dict.fromkeys(["README.md", "eval_results.json", "model.safetensors.bak", "run.py"], "x"))
    assert foreign_files(tmp_path / "out") == ["README.md", "eval_results.json", "model.safetensors.bak", "run.py"]
    assert not remove_own_files(tmp_path / "out")
    assert len(files_in(tmp_path / "out")) == 4


def test_without_a_record_only_averages_in_folders_of_their_own_count(tmp_path: Path) -> None:
    write(tmp_path / "out", {"a/lagless.json": "{}", "a/model.safetensors": "x", "b/model.safetensors": "x"})
    assert foreign_files(tmp_path / "out") == [os.path.join("b", "model.safetensors")]


def test_a_removal_that_was_interrupted_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of removals, what is left is still known."""
    unlink, calls = os.unlink, []

    def fail(path: Path) -> None:
        calls.append(path)
        if len(calls) > allowed:
            raise KeyboardInterrupt
        unlink(path)

    for allowed in range(5):
        out, calls = tmp_path / f"out{allowed}", []
        with atomic_folder(out) as temporary:
            write(temporary, OWN | {"deep/lagless.json": "{}"})
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "unlink", fail)
            remove_own_files(out)
        assert foreign_files(out) == []
        assert remove_own_files(out)


def test_a_checkpoint_with_a_list_is_no_average(tmp_path: Path) -> None:
    for step, record in ((0, {}), (1, {}), (2, {"lagless": "0.1.0", "rule": {}})):
        with atomic_folder(tmp_path / f"checkpoint-{step}") as temporary:
            save_file({"w": torch.ones(2) * step}, temporary / "model.safetensors")
            write(temporary, {RECORD: json.dumps(record)} if record else {})
    assert find_checkpoints(tmp_path).steps == (0, 1)
    assert [records_average(tmp_path / f"checkpoint-{step}") for step in range(4)] == [False, False, True, False]
    write(tmp_path / "checkpoint-1", {RECORD: "damaged"})
    assert records_average(tmp_path / "checkpoint-1")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as temporary:
        try:
            (temporary / os.fsdecode(b"LICENSE\xff")).write_text("x")
        except OSError:
            pytest.skip("the file system has names of text only")
    assert foreign_files(tmp_path / "out") == []
    assert remove_own_files(tmp_path / "out")
