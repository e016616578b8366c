from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.model_files import files_under

from lagless.checkpoints import CheckpointError, _atomic_folder, open_checkpoint
from lagless.checkpoints._atomic_folder import check_destination
from lagless.checkpoints._layout import plan_layout
from lagless.checkpoints._safetensors_format import TensorInfo
from lagless.checkpoints._writer import ModelWriter

TENSORS = {
    "a": TensorInfo(torch.float32, (100,)),
    "b": TensorInfo(torch.bfloat16, (4, 5)),
    "e": TensorInfo(torch.float32, (0,)),
}


def _write(out: Path, names: list[str], dtype: str = "auto", scale: float = 1.0, **options: object) -> None:
    layout = plan_layout(TENSORS, dtype, **options)  # type: ignore[arg-type]
    with ModelWriter(out, names, layout) as writer:
        block = torch.stack([torch.arange(100.0) * (i + 1) * scale for i in range(len(names))])
        writer("a", 60, block[:, 60:])
        writer("b", 0, block[:, :20])
        writer("a", 0, block[:, :60])


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("shard", ["5GB", 100])
def test_ranges_land_where_the_library_finds_them(tmp_path: Path, dtype: str, shard: int | str) -> None:
    _write(tmp_path / "out", ["x", "y"], dtype, max_shard_size=shard)
    for row, name in enumerate(("x", "y")):
        folder = tmp_path / "out" / name
        found: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            found |= load_file(file)
        a, b = torch.arange(100.0) * (row + 1), torch.arange(20.0).reshape(4, 5) * (row + 1)
        kept = {"a": torch.float32, "b": torch.bfloat16}
        for key, value in (("a", a), ("b", b)):
            assert torch.equal(found[key], value.to(kept[key] if dtype == "auto" else getattr(torch, dtype)))
        assert found["e"].shape == (0,)
        assert (folder / "model.safetensors.index.json").exists() == (shard == 100)
        assert open_checkpoint(folder).tensors.keys() == TENSORS.keys()


def test_a_single_row_is_the_folder_itself(tmp_path: Path) -> None:
    _write(tmp_path / "deep" / "out", [""])
    assert files_under(tmp_path) == ["deep", "deep/out", "deep/out/lagless.json", "deep/out/model.safetensors"]


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _write(tmp_path / "out", [""])
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: BaseException) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(type(error)):
        with ModelWriter(tmp_path / "new" / "out", ["x", "y"], plan_layout(TENSORS)) as writer:
            writer("a", 0, torch.ones(2, 100))
            assert any("tmp" in name for name in files_under(tmp_path))
            raise error
    assert files_under(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    calls, real = [], getattr(os, call)

    def full(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    needed = 2 * plan_layout(TENSORS).nbytes
    with pytest.raises(
        CheckpointError, match=f"out: the disk is full: {needed:,} bytes are needed in all, [0-9,]+ were free"
    ):
        _write(tmp_path / "out", ["x", "y"])
    assert files_under(tmp_path) == []


def test_a_failing_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(CheckpointError, match="out: writing failed .Input/output error.. Nothing was kept"):
        _write(tmp_path / "out", [""])
    assert files_under(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, content, at: real(fd, content[:7], at))
    _write(tmp_path / "out", [""])
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].tolist() == list(range(100))


def test_more_models_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lagless.checkpoints._writer.spare_descriptors", lambda: 2)
    names = [f"m{i}" for i in range(5)]
    _write(tmp_path / "out", names)
    for row, name in enumerate(names):
        found = load_file(tmp_path / "out" / name / "model.safetensors")["a"]
        assert torch.equal(found, torch.arange(100.0) * (row + 1))


def test_values_beyond_float16_are_refused_and_infinity_passes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor 'a' reaches 99000, more than float16 can hold"):
        _write(tmp_path / "out", [""], "float16", scale=1000.0)
    assert files_under(tmp_path) == []
    with ModelWriter(tmp_path / "out", [""], plan_layout(TENSORS, "float16")) as writer:
        writer("a", 0, torch.full((1, 100), float("inf")))


def test_folders_that_would_be_destroyed_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoint-1"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for overwrite in (False, True):
        for out in (tmp_path, run, run.parent, tmp_path / "link"):
            with pytest.raises(CheckpointError, match="the output folder holds .*checkpoint-1, which is read"):
                check_destination(out, [run], overwrite)
        with pytest.raises(CheckpointError, match="file: is a file"):
            check_destination(tmp_path / "file", [run], overwrite)
        with pytest.raises(CheckpointError, match="a link that leads nowhere"):
            check_destination(tmp_path / "dangling", [run], overwrite)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "checkpoint-1").symlink_to(run)
    with pytest.raises(CheckpointError, match="which is read"):
        check_destination(linked, [linked / "checkpoint-1"], True)
    check_destination(run.parent / "averages", [run], False)


def test_overwriting_replaces_averages_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    check_destination(out, [], False)
    (out / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="out: the output folder is not empty.*--overwrite"):
        check_destination(out, [], False)
    with pytest.raises(CheckpointError, match="lagless did not write thesis.tex in it"):
        check_destination(out, [], True)
    (out / "thesis.tex").unlink()
    (out / "bema").mkdir()
    (out / "bema" / "lagless.json").touch()
    check_destination(out, [], True)
    _write(out, [""])
    assert files_under(tmp_path) == ["out", "out/lagless.json", "out/model.safetensors"]


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "lagless.json").write_text("old")
    with pytest.raises(RuntimeError), ModelWriter(out, [""], plan_layout(TENSORS)):
        raise RuntimeError
    assert files_under(tmp_path) == ["out", "out/lagless.json"]
    real = os.rename

    def second_fails(source: Path, target: Path) -> None:
        if "tmp" in Path(source).name:
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(_atomic_folder, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(CheckpointError, match="out: cannot be put in place .Device or resource busy"):
        _write(out, [""])
    assert files_under(tmp_path) == ["out", "out/lagless.json"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    _write(tmp_path / "out", [""])
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real" / "model.safetensors").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be made"):
        _write(tmp_path / "file" / "out", [""])
