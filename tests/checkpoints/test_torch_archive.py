"""Torch files are read as torch.load reads them, or refused; nothing in them is run or mapped into memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from lagless.checkpoints import CheckpointError, open_checkpoint
from lagless.checkpoints._torch_archive import ArchivedTensor, Storage


def rezipped(path: Path, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    """Write the archive anew; records for which ``change`` gives None are dropped."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w", method) as new:
        for record in old.infolist():
            if (data := change(record.filename, old.read(record))) is not None:
                new.writestr(record.filename, data)
    path.write_bytes(content.getvalue())
    return path


STATE = {"w": torch.randn(3, 5), "half": torch.randn(7).bfloat16(), "n": torch.arange(8), "scalar": torch.tensor(2.0)}


def check(path: Path) -> None:
    expected = torch.load(path, weights_only=True)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read_tensor(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["x.pt", "Modèle.pt", "data.pth"])
def test_an_archive_that_was_zipped_again_without_compression_is_read(tmp_path: Path, name: str) -> None:
    torch.save(STATE, tmp_path / name)
    check(tmp_path / name)
    check(rezipped(tmp_path / name, lambda _, data: data))


def test_views_shared_storages_parameters_and_every_type_are_read(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    state: dict[str, Any] = {
        "base": base,
        "part": base[2:4],
        "column": base[:, 1],
        "transposed": base.T,
        "expanded": base[:1].expand(5, 4),
        "parameter": torch.nn.Parameter(base),
        "empty": torch.empty(0, 3),
        "one": base[3, 2],
    }
    for dtype in (torch.float64, torch.float16, torch.int8, torch.int16, torch.int32, torch.uint8, torch.bool):
        state[str(dtype)] = torch.arange(5).to(dtype)
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        state[str(dtype)] = torch.arange(5).to(dtype)
    torch.save(OrderedDict(state), tmp_path / "x.pt")
    check(tmp_path / "x.pt")


def test_other_objects_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    import argparse

    content = {"state_dict": STATE, "args": argparse.Namespace(lr=1), "epoch": 3, "optimizer": {"m": torch.ones(3, 3)}}
    torch.save(content, tmp_path / "x.pt")
    assert open_checkpoint(tmp_path / "x.pt").tensors.keys() == STATE.keys()


def longer(name: str, data: bytes) -> bytes:
    return data + b"\0\0\0\0" if "/data/" in name else data


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "compressed": (lambda p: rezipped(p, lambda _, data: data, zipfile.ZIP_DEFLATED), "is compressed"),
    "other byte order": (lambda p: rezipped(p, lambda n, d: b"big" if n.endswith("byteorder") else d), "byte order"),
    "record lost": (lambda p: rezipped(p, lambda n, d: None if n.endswith("data/0") else d), "data/0 is missing"),
    "record longer": (lambda p: rezipped(p, longer), "has .* bytes, its storage"),
    "no pickle": (lambda p: rezipped(p, lambda n, d: None if n.endswith("data.pkl") else d), "needs one record"),
    "TorchScript": (
        lambda p: rezipped(p, lambda n, d: d) and zipfile.ZipFile(p, "a").writestr("x/constants.pkl", b""),
        "TorchScript",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_archives_that_are_not_as_torch_writes_them_are_refused(tmp_path: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    torch.save(STATE, tmp_path / "x.pt")
    spoil(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("tensor", [torch._neg_view(torch.ones(3)), torch.ones(3, device="meta")])
def test_tensors_without_plain_memory_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"w": tensor}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt: .*(neg: save a copy|without data)"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content, places",
    [
        ({"model": {"w": torch.ones(2, 2)}, "ema": {"w": torch.ones(2, 2)}}, "'model' and 'ema'"),
        (
            {"state_dict": {"w": torch.ones(2, 2)}, "extra": {"ema": {"w": torch.ones(2, 2)}}},
            "'state_dict' and 'extra.ema'",
        ),
        ({"w": torch.ones(2, 2), "ema": {"w": torch.ones(2, 2)}}, "the top and 'ema'"),
    ],
)
def test_two_dictionaries_of_weights_are_refused(tmp_path: Path, content: Any, places: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"holds matrices under {places}"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path, shape: tuple[int, int]) -> None:
    weights = torch.randn(400, 300) if shape == (400, 300) else torch.randn(400, 300).T
    torch.save({"w": weights}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    checkpoint.read_range("w", 0, 5)
    os.truncate(tmp_path / "x.pt", 5000)
    with pytest.raises(CheckpointError, match="x.pt: ended at byte .* while being read"):
        checkpoint.read_tensor("w")


def test_reading_maps_nothing_into_memory(tmp_path: Path) -> None:
    """A mapped file that shrinks ends the process by a signal."""
    torch.save({"w": torch.randn(1000, 100)}, tmp_path / "weights-file.pt")
    code = (
        "import sys; from lagless.checkpoints import open_checkpoint\n"
        "checkpoint = open_checkpoint(sys.argv[1]); checkpoint.read_range('w', 0, 9)\n"
        "sys.exit('weights-file' in open('/proc/self/maps').read())"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not list mappings")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "weights-file.pt")], check=True)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=3), st.integers(0, 9), st.integers(0, 60))
def test_tensors_stay_inside_of_their_storage(sides: list[tuple[int, int]], offset: int, count: int) -> None:
    shape, strides = tuple(size for size, _ in sides), tuple(stride for _, stride in sides)
    storage = torch.arange(count)
    try:
        tensor = ArchivedTensor(Storage("0", torch.int64, 8 * count), torch.int64, shape, strides, offset)
    except ValueError:
        with pytest.raises(RuntimeError):
            storage.as_strided(shape, strides, offset)
    else:
        if 0 not in shape:
            values = storage.as_strided(shape, strides, offset)
            assert int(values.max()) - int(values.min()) + 1 == tensor.extent
            assert values.is_contiguous() == tensor.is_row_major
