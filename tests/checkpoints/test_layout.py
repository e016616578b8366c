from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, strategies as st

from lagless.checkpoints._layout import parse_size, plan_layout
from lagless.checkpoints._safetensors_format import TensorInfo

TENSORS = {name: TensorInfo(torch.bfloat16, (10, 50)) for name in "abcde"} | {"count": TensorInfo(torch.int64, ())}


def test_one_file_needs_no_index() -> None:
    layout = plan_layout(TENSORS)
    assert [file.name for file in layout.files] == ["model.safetensors"] and layout.index is None
    assert layout.nbytes == len(layout.files[0].header) + 5 * 1000 + 8


def test_shards_are_named_and_indexed_as_transformers_does() -> None:
    layout = plan_layout(TENSORS, max_shard_size=2500)
    assert [file.name for file in layout.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert layout.index is not None and layout.index[0] == "model.safetensors.index.json"
    index = json.loads(layout.index[1])
    assert index["metadata"] == {"total_parameters": 2501, "total_size": 5008}
    assert index["weight_map"] == {name: layout.places[name][0] for name in TENSORS}
    assert [index["weight_map"][name][:11] for name in "abcde"] == ["model-00001"] * 2 + ["model-00002"] * 2 + [
        "model-00003"
    ]


def test_an_adapter_is_never_cut() -> None:
    assert [file.name for file in plan_layout(TENSORS, "auto", 1, adapter=True).files] == ["adapter_model.safetensors"]


def test_only_floating_point_tensors_change_type() -> None:
    types = {name: info.dtype for name, info in plan_layout(TENSORS, "float32").tensors.items()}
    assert types == {name: torch.float32 for name in "abcde"} | {"count": torch.int64}


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.integers(1, 200))
def test_every_tensor_has_one_place_and_files_are_full(sizes: list[int], limit: int) -> None:
    tensors = {str(i): TensorInfo(torch.uint8, (size,)) for i, size in enumerate(sizes)}
    layout = plan_layout(tensors, max_shard_size=limit)
    for file in layout.files:
        spans = sorted(
            (begin, begin + sizes[int(name)]) for name, (f, begin) in layout.places.items() if f == file.name
        )
        assert spans[0][0] == len(file.header) and spans[-1][1] == file.size
        assert all(stop == start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))
        assert len(spans) == 1 or spans[-1][1] - spans[0][0] <= limit


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), (7, 7), ("2 KiB", 2048), ("1.5mb", 1_500_000), ("10B", 10)])
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", 0, "0.1", "nan"])
def test_sizes_that_are_none(text: int | str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is not understood")):
        parse_size(text)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype='float8'; it must be one of 'auto', 'float64'"):
        plan_layout(TENSORS, "float8")


@given(st.integers(1, 8), st.integers(1, 4000))
def test_ranks_share_whole_files_evenly(ranks: int, limit: int) -> None:
    layout = plan_layout(TENSORS, max_shard_size=limit)
    shares = [layout.share(rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(TENSORS)
    files = [{layout.places[name][0] for name in share} for share in shares]
    assert sum(map(len, files)) == len(layout.files)
    sizes = {file.name: file.size for file in layout.files}
    loads = [sum(sizes[name] for name in own) for own in files]
    assert max(loads) - min(loads) <= max(sizes.values())
