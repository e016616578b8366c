from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.model_files import make_state, save_model, save_sharded

from lagless.checkpoints import CheckpointError, fingerprint, open_checkpoint


def _equal(path: Path, state: dict) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in state.items():
        found = checkpoint.read_tensor(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["folder", "shards", "bin", "adapter", "file", "other name", "pt", "nested"])
def test_every_kind_of_checkpoint_gives_back_its_tensors(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    state, path = make_state(1, dtype), tmp_path / "checkpoint-5"
    path.mkdir()
    if kind == "folder":
        save_model(state, path)
    elif kind == "shards":
        save_sharded(state, path, 3)
    elif kind == "bin":
        torch.save(state, path / "pytorch_model.bin")
        torch.save({"lr": 1}, path / "optimizer.pt")
    elif kind == "adapter":
        save_file(state, path / "adapter_model.safetensors")
    elif kind == "other name":
        save_file(state, path / "weights.safetensors")
    elif kind == "file":
        path = path / "x.safetensors"
        save_file(state, path)
    elif kind == "pt":
        path = path / "x.pt"
        torch.save(state, path)
    else:
        path = path / "x.pth"
        torch.save({"state_dict": state, "step": 3}, path)
    _equal(path, state)
    assert open_checkpoint(path).is_adapter == (kind == "adapter")


def test_a_transposed_tensor_in_a_torch_file_is_read_in_its_own_order(tmp_path: Path) -> None:
    state = {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.arange(12).bfloat16().reshape(3, 4)[:, ::2]}
    torch.save(state, tmp_path / "x.pt")
    _equal(tmp_path / "x.pt", state)
    assert open_checkpoint(tmp_path / "x.pt").read_range("a", 2, 5).tolist() == state["a"].reshape(-1)[2:5].tolist()


def test_a_range_reads_those_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model({"a": torch.arange(1000.0)}, tmp_path)
    counts, real = [], os.preadv

    def counting(*arguments: object) -> int:
        counts.append(real(*arguments))  # type: ignore[arg-type]
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read_range("a", 10, 14).tolist() == [10.0, 11.0, 12.0, 13.0]
    assert counts == [16]
    with pytest.raises(ValueError, match="not a range of tensor 'a'"):
        checkpoint.read_range("a", 10, 1001)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model({"a": torch.arange(100.0)}, tmp_path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:7]], at))
    assert open_checkpoint(tmp_path).read_tensor("a").tolist() == list(range(100))


class _Payload:
    def __reduce__(self) -> tuple:
        return (print, ("unpickled",))


def _touch(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _pickle(path: Path) -> Path:
    torch.save({"a": torch.ones(2), "b": _Payload()}, path)
    return path


def _legacy(path: Path) -> Path:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    return path


def _truncated_torch(path: Path) -> Path:
    torch.save({"a": torch.ones(20000)}, path)
    return _touch(path, path.read_bytes()[:30000])


def _saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def _both(folder: Path) -> Path:
    save_model(make_state(0), folder)
    save_file(make_state(0), folder / "adapter_model.safetensors")
    return folder


def _missing_shard(folder: Path) -> Path:
    save_sharded(make_state(0), folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    return folder


def _no_index(folder: Path) -> Path:
    save_sharded(make_state(0), folder, 3)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def _index(folder: Path, content: str) -> Path:
    save_sharded(make_state(0), folder, 1)
    (folder / "model.safetensors.index.json").write_text(content)
    return folder


def _quantized(folder: Path) -> Path:
    save_model(make_state(0), folder)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    return folder


def _in_two_shards(folder: Path) -> Path:
    save_sharded(make_state(0), folder, 2)
    save_file(make_state(0), folder / "model-00002-of-00002.safetensors")
    return folder


def _nested_header(path: Path) -> Path:
    text = b'{"__metadata__":' + b"[" * 9000 + b"]" * 9000 + b"}"
    return _touch(path, struct.pack("<Q", len(text)) + text)


def _nested_config(folder: Path) -> Path:
    save_model(make_state(0), folder)
    return _touch(folder / "config.json", b'{"a":' * 9000 + b"0" + b"}" * 9000).parent


def _codes(folder: Path, **tensors: torch.Tensor) -> Path:
    save_model({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder)
    return folder


_PACKED, _SCALE = torch.ones(4, 4, dtype=torch.uint8), torch.ones(4)

BAD = {
    "nested header": (lambda d: _nested_header(d / "x.safetensors"), "header is not JSON .nested too deeply"),
    "nested index": (lambda d: _index(d, "[" * 9000 + "]" * 9000), "index.json: not a JSON object .nested too deeply"),
    "nested config": (_nested_config, "config.json: not a JSON object .nested too deeply"),
    "list for a map": (lambda d: _index(d, '{"weight_map": ["a"]}'), "weight_map must give each tensor a file"),
    "number for a file": (lambda d: _index(d, '{"weight_map": {"a": 3}}'), "weight_map must give each tensor a file"),
    "in two shards": (_in_two_shards, "model-00002-of-00002.safetensors: tensor '.*' is in another shard too"),
    "name too long": (lambda d: d / ("x" * 300) / "model.safetensors", "cannot be read .File name too long"),
    "GPTQ": (lambda d: _codes(d, q__qweight=_PACKED.int(), q__scales=_SCALE), "'q.qweight' .I32.* holds integer codes"),
    "bitsandbytes": (lambda d: _codes(d, q__weight=_PACKED, q__weight__absmax=_SCALE), "'q.weight' .* integer codes"),
    "int8": (lambda d: _codes(d, q__weight=_PACKED.char()), "'q.weight' .* integer codes.*Dequantize"),
    "packed": (lambda d: _codes(d, q__anything=_PACKED, q__weight_scale=_SCALE), "'q.anything' .* integer codes"),
    "absent": (lambda d: d / "x", "x: no such checkpoint"),
    "empty folder": (lambda d: d, "no weights found. Looked for model.safetensors.*found nothing.*still being written"),
    "fsdp": (
        lambda d: _touch(d / "pytorch_model_fsdp_0" / "x").parent.parent,
        "sharded state without .metadata.*did not finish",
    ),
    "deepspeed": (lambda d: _touch(d / "zero_to_fp32.py").parent, "run the zero_to_fp32.py beside it first"),
    "two files": (lambda d: _touch(_touch(d / "a.pt").parent / "b.pt").parent, "Give the file that is meant"),
    "both": (_both, "has both model.safetensors and adapter_model.safetensors"),
    "missing shard": (_missing_shard, "model-00002-of-00003.safetensors: this shard is missing"),
    "no index": (_no_index, "shards without their index"),
    "index garbage": (lambda d: _index(d, "{"), "index.json: not a JSON object .*index of shards"),
    "index outside": (lambda d: _index(d, '{"weight_map": {"a": "../x.safetensors"}}'), "a file beside the index"),
    "index of another save": (
        lambda d: _index(d, '{"weight_map": {"zz": "model-00001-of-00001.safetensors"}}'),
        "has no tensor 'zz'.*not of one save",
    ),
    "unknown suffix": (lambda d: _touch(d / "x.npz"), "unknown kind of file"),
    "pickle": (lambda d: _pickle(d / "x.pt"), "entry 'b' is a print, not a tensor.*Save the weights as safetensors"),
    "raw pickle": (lambda d: _touch(d / "x.bin", pickle.dumps({"a": 1})), "cannot be read as a torch file"),
    "legacy": (lambda d: _legacy(d / "x.bin"), "cannot be read as a torch file.*before torch 1.6"),
    "truncated torch": (lambda d: _truncated_torch(d / "x.bin"), "cannot be read as a torch file"),
    "list": (lambda d: _saved(d / "x.pt", [torch.ones(2)]), "holds a list, not a state dict"),
    "not tensors": (lambda d: _saved(d / "x.pt", {"a": torch.ones(2), "n": 3}), "entry 'n' is a int, not a tensor"),
    "sparse": (
        lambda d: _saved(d / "x.pt", {"a": torch.eye(2).to_sparse()}),
        "kind that cannot be averaged ._rebuild_sparse_tensor",
    ),
    "float8": (
        lambda d: _saved(d / "x.pt", {"a": torch.ones(2).to(torch.float8_e4m3fn)}),
        "'a' .F8_E4M3 .2.. is torch.float8_e4m3fn, which cannot be averaged without its scale",
    ),
    "no tensors": (lambda d: save_model({}, d) or d, "holds no tensors"),
    "quantized": (_quantized, "config.json: the weights are quantized"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_opened_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(tmp_path) in str(caught.value)
    assert capsys.readouterr().out == ""


def test_tensors_that_the_index_omits_are_read_from_its_shards(tmp_path: Path) -> None:
    """from_pretrained loads whole shards, so that these are weights of the model too."""
    state = make_state(0)
    save_sharded(state, tmp_path, 2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["norm.weight"]
    path.write_text(json.dumps(index))
    _equal(tmp_path, state)


def test_indices_and_counters_are_no_codes(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(2), "a.relative_position_index": torch.ones(4, 4).long(), "b.scale": torch.ones(3)}
    save_model(state, tmp_path)
    assert open_checkpoint(tmp_path).tensors.keys() == state.keys()


def test_folders_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot be read .Permission denied.. Check the path and"):
        open_checkpoint(tmp_path)


def test_a_relative_path_keeps_its_meaning_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(0)
    save_model(state, tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("a")
    monkeypatch.chdir("/")
    assert torch.equal(checkpoint.read_tensor("mlp.weight"), state["mlp.weight"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/a").path == tmp_path / "a"


def test_an_adapter_beside_a_quantized_configuration_is_fine(tmp_path: Path) -> None:
    save_file(make_state(0), tmp_path / "adapter_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    assert open_checkpoint(tmp_path).is_adapter


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    save_model({"a": torch.arange(1000.0)}, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 500)
    with pytest.raises(CheckpointError, match="ended at byte .* while being read"):
        checkpoint.read_tensor("a")
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        checkpoint.check_unchanged()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        checkpoint.read_tensor("a")


def test_the_fingerprint_does_not_depend_on_the_files(tmp_path: Path) -> None:
    state = make_state(3)
    save_model(state, tmp_path / "one")
    save_sharded(state, tmp_path / "three", 3)
    torch.save(dict(reversed(state.items())), tmp_path / "x.pt")
    prints = {fingerprint(tmp_path / name) for name in ("one", "three", "x.pt")}
    assert len(prints) == 1 and prints.pop().startswith("xxh3-128:")


def test_one_bit_a_name_a_type_or_a_shape_changes_the_fingerprint(tmp_path: Path) -> None:
    state = make_state(3)
    bit = {name: tensor.clone() for name, tensor in state.items()}
    bit["mlp.weight"].view(torch.int32)[7, 3] ^= 1
    renamed = {name.replace("scale", "scald"): tensor for name, tensor in state.items()}
    retyped = state | {"norm.weight": state["norm.weight"].view(torch.int32)}
    reshaped = state | {"mlp.weight": state["mlp.weight"].reshape(9, 300)}
    for i, other in enumerate((state, bit, renamed, retyped, reshaped)):
        save_model(other, tmp_path / str(i))
    assert len({fingerprint(tmp_path / str(i)) for i in range(5)}) == 5
