"""Quantized checkpoints are read as the numbers that their codes stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lagless.checkpoints import CheckpointError, find_checkpoints, open_checkpoint
from lagless.posthoc import average_checkpoints, inspect_run

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}, "targets": ["Linear"]}},
}
INT8 = COMPRESSED | {
    "format": "int-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}, "targets": ["Linear"]}},
}


def _write(folder: Path, state: dict[str, Tensor], quantization: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    named = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": quantization, **config}
    (folder / "config.json").write_text(json.dumps(named))
    return folder


def _codes(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _by_hand(codes: Tensor, scale: Tensor, block: tuple[int, int], zero: Tensor | None = None) -> Tensor:
    """Element by element, as the formats are described."""
    out = torch.empty(codes.shape)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            at = (i // block[0], j // block[1])
            out[i, j] = (codes[i, j].float() - (0.0 if zero is None else float(zero[at]))) * scale[at].float()
    return out


def test_blocks_of_fp8_with_an_odd_rest(tmp_path: Path) -> None:
    codes, scale = _codes(0, (5, 7)), torch.rand(3, 3) + 0.5
    state = {"a.weight": codes, "a.weight_scale_inv": scale, "norm.weight": torch.ones(7, dtype=torch.bfloat16)}
    checkpoint = open_checkpoint(_write(tmp_path, state, FP8 | {"weight_block_size": [2, 3]}))
    assert checkpoint.tensors.keys() == {"a.weight", "norm.weight"}
    assert torch.equal(checkpoint.read_tensor("a.weight"), _by_hand(codes, scale, (2, 3)))
    assert checkpoint.written["a.weight"].dtype == torch.bfloat16
    assert checkpoint.quantized == "fp8"


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.data())
@settings(max_examples=40, deadline=None)
def test_any_range_of_any_blocks(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, high: int, wide: int, data: st.DataObject
) -> None:
    codes, scale = _codes(rows, (rows, columns)), torch.rand(-(-rows // high), -(-columns // wide)) + 0.5
    folder = tmp_path_factory.mktemp("run")
    settings_of = FP8 | {"weight_block_size": [high, wide]}
    checkpoint = open_checkpoint(_write(folder, {"a.weight": codes, "a.weight_scale_inv": scale}, settings_of))
    start = data.draw(st.integers(0, codes.numel()))
    stop = data.draw(st.integers(start, codes.numel()))
    block = (rows, columns) if scale.numel() == 1 else (high, wide)
    assert torch.equal(
        checkpoint.read_range("a.weight", start, stop), _by_hand(codes, scale, block).view(-1)[start:stop]
    )


@pytest.mark.parametrize(
    "quantization, dtype, scale, block, zero",
    [
        (COMPRESSED, torch.float8_e4m3fn, (1,), (4, 6), None),
        (COMPRESSED, torch.float8_e4m3fn, (4, 1), (1, 6), None),
        ({"quant_method": "fbgemm_fp8"}, torch.float8_e4m3fn, (4, 1), (1, 6), None),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, torch.float8_e5m2, (), (4, 6), None),
        (INT8, torch.int8, (4, 1), (1, 6), None),
        (INT8, torch.int8, (4, 3), (1, 2), (4, 3)),
    ],
)
def test_scales_of_each_shape(
    tmp_path: Path,
    quantization: dict[str, Any],
    dtype: torch.dtype,
    scale: tuple[int, ...],
    block: tuple[int, int],
    zero: tuple[int, ...] | None,
) -> None:
    codes, scales = _codes(0, (4, 6), dtype), (torch.rand(scale) + 0.5).to(torch.bfloat16)
    state = {"a.weight": codes, "a.weight_scale": scales, "a.input_scale": torch.ones(1)}
    zeros = None
    if zero is not None:
        zeros = _codes(1, zero, torch.int8)
        state["a.weight_zero_point"] = zeros
    checkpoint = open_checkpoint(_write(tmp_path, state, quantization))
    tables = [
        t if t is None else t.expand(4 // block[0], 6 // block[1]) for t in (scales.reshape(scale or (1,)), zeros)
    ]
    assert torch.equal(checkpoint.read_tensor("a.weight"), _by_hand(codes, tables[0], block, tables[1]))
    assert checkpoint.left_out == ("a.input_scale",) and list(checkpoint.tensors) == ["a.weight"]


def test_an_average_is_written_in_the_precision_before_quantization(tmp_path: Path) -> None:
    scale = torch.full((1, 1), 0.25)
    codes = [_codes(i, (3, 4)) for i in range(2)]
    for i, code in enumerate(codes):
        folder = tmp_path / "run" / f"checkpoint-{i}"
        _write(
            folder,
            {"a.weight": code, "a.weight_scale_inv": scale, "b.bias": torch.full((3,), float(i))},
            FP8,
            dtype="float16",
        )
        (folder / "hf_quant_config.json").write_text("{}")
    summary = inspect_run(tmp_path / "run")
    assert (summary.quantized, summary.written) == ("fp8", "F16, F32")
    average_checkpoints(tmp_path / "run", [0.25, 0.75], tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = 0.25 * 0.25 * codes[0].float() + 0.75 * 0.25 * codes[1].float()
    assert written.keys() == {"a.weight", "b.bias"}
    assert torch.equal(written["a.weight"], expected.to(torch.float16))
    assert torch.equal(written["b.bias"], torch.full((3,), 0.75))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": "float16"}
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    average_checkpoints(tmp_path / "run", [0.25, 0.75], tmp_path / "wide", dtype="float32")
    assert torch.equal(load_file(tmp_path / "wide" / "model.safetensors")["a.weight"], expected)


def test_a_base_in_bfloat16_may_be_the_start(tmp_path: Path) -> None:
    state = {"a.weight": _codes(0, (3, 4)), "a.weight_scale_inv": torch.ones(1, 1)}
    _write(tmp_path / "run" / "checkpoint-1", state, FP8)
    (tmp_path / "base").mkdir()
    save_file({"a.weight": torch.ones(3, 4, dtype=torch.bfloat16)}, tmp_path / "base" / "model.safetensors")
    found = find_checkpoints(tmp_path / "run", start=tmp_path / "base")
    assert found.steps == (0, 1)


@pytest.mark.parametrize(
    "quantization, message",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by 'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'"),
        ({"quant_method": "mxfp4"}, "quantized by 'mxfp4'"),
        (COMPRESSED | {"format": "pack-quantized"}, "'compressed-tensors', format 'pack-quantized', 8 bits"),
        (
            INT8 | {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
            "'compressed-tensors', format 'int-quantized', 4 bits",
        ),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, quantization: dict[str, Any], message: str) -> None:
    _write(tmp_path, {"a.weight": torch.ones(2, 2)}, quantization)
    with pytest.raises(CheckpointError, match=f"config.json: the weights are quantized by.*{message}|{message}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "state, message",
    [
        ({"a.weight": _codes(0, (4, 6))}, "which cannot be averaged without its scale"),
        (
            {"a.weight": _codes(0, (4, 6)), "a.weight_scale_inv": torch.ones(3, 5)},
            r"the scale of 'a.weight' \(F8_E4M3 \[4, 6\]\) is F32 \[3, 5\], which does not say",
        ),
        (
            {"a.weight": _codes(0, (4, 6)), "a.weight_scale_inv": torch.ones(4, 1, dtype=torch.int32)},
            "is I32 .* which does not say",
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, state: dict[str, Tensor], message: str) -> None:
    _write(tmp_path, state, FP8)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
