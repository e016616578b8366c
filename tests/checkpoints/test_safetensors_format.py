from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load, save

from lagless.checkpoints import CheckpointError
from lagless.checkpoints._safetensors_format import DTYPES, TensorInfo, build_header, read_header

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def _file(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a complete safetensors file"),
        (b"\1\2\3", "not a complete safetensors file"),
        (struct.pack("<Q", 10**12) + b"{}", "header of 1000000000000 is announced"),
        (_file(b"{not json}"), "header is not JSON"),
        (_file(b"\xff\xfe\xfd"), "header is not JSON"),
        (_file([1, 2]), "header is not JSON"),
        (_file({"a": 3}), "entry of tensor 'a' is malformed"),
        (_file({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}), "malformed"),
        (_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}), "malformed"),
        (_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "malformed"),
        (_file({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), "takes 12 bytes, its header gives it 8"),
        (
            _file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}),
            "begins at byte 4 of the data, not at 0",
        ),
        (_file(GOOD, b"\0" * 7), r"is truncated: its header promises \d+ bytes, the file has \d+.*still being written"),
        (_file(GOOD, b"\0" * 9), "the file has .* bytes, its header describes only"),
        (
            _file({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}),
            "type F8_E8M0, which cannot be averaged",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent.safetensors: cannot be read"):
        read_header(tmp_path / "absent.safetensors")


infos = st.builds(
    TensorInfo, st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=3).map(tuple)
)


@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"), infos, max_size=6))
def test_the_safetensors_library_reads_our_headers(tensors: dict[str, TensorInfo]) -> None:
    header, offsets = build_header(tensors)
    assert len(header) % 8 == 0
    assert all(offsets[name] % info.dtype.itemsize == 0 for name, info in tensors.items())
    found = load(header + bytes(sum(info.nbytes for info in tensors.values())))
    assert {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in found.items()} == tensors


def test_we_read_the_librarys_headers(tmp_path: Path) -> None:
    state = {
        "b": torch.ones(2, 3, dtype=torch.bfloat16),
        "a": torch.zeros(()),
        "e": torch.zeros(0, 2),
        "i": torch.arange(3),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(state, {"format": "pt"}))
    content, header = path.read_bytes(), read_header(path)
    assert {name: stored.info for name, stored in header.items()} == {
        name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in state.items()
    }
    for name, (info, offset) in header.items():
        expected = bytes(state[name].reshape(-1).view(torch.uint8).tolist())
        assert content[offset : offset + info.nbytes] == expected
