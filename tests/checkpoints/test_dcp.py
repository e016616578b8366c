"""Checkpoints of torch.distributed.checkpoint as sources; those of several ranks are in tests/distributed."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, strategies as st
from tests.model_files import make_state, save_model

from lagless import EMA
from lagless.checkpoints import CheckpointError, fingerprint, open_checkpoint
from lagless.checkpoints._chunks import Chunk, covers
from lagless.posthoc import average_checkpoints, inspect_run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def save(state: dict[str, Any], folder: Path) -> Path:
    dcp.save(state, checkpoint_id=folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_reads_what_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    state = make_state(0, dtype)
    checkpoint = open_checkpoint(save(state, tmp_path / "a"))
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read_tensor(name), tensor), name
        third = tensor.numel() // 3
        assert torch.equal(checkpoint.read_range(name, third, tensor.numel()), tensor.flatten()[third:])
    save_model(state, tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


WEIGHTS = {"model.embed.weight": torch.ones(3), "lm_head.weight": torch.zeros(2)}
OTHER = {"optimizer": {"state": {"model.embed.weight": {"exp_avg": torch.ones(3)}}}, "step": 4}


@pytest.mark.parametrize(
    "state",
    [
        {"model": WEIGHTS, **OTHER},
        {"state_dict": WEIGHTS, **OTHER},
        {**WEIGHTS, **OTHER},
        {"app": {"model": WEIGHTS, "optim": OTHER}},
        {"state_dict": {"model": WEIGHTS, **OTHER}},
        {"model": WEIGHTS, "optimizer": {"model": {"lm_head.weight": torch.ones(2)}}},
        {**WEIGHTS, "rng_state": torch.ones(5, dtype=torch.uint8), "scaler": torch.ones(())},
    ],
)
def test_weights_are_told_from_other_states(tmp_path: Path, state: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(save(state, tmp_path / "a"))
    assert checkpoint.tensors.keys() == WEIGHTS.keys()
    assert torch.equal(checkpoint.read_tensor("lm_head.weight"), WEIGHTS["lm_head.weight"])


FLAT = {
    "torchtitan": ["optimizer.state.layers.0.wq.weight.exp_avg", "optimizer.param_groups.layers.0.wq.weight.lr"],
    "Megatron": [
        *("optimizer.state.exp_avg.decoder.weight", "optimizer.state.fp32_param.decoder.weight"),
        *("chained_0.optimizer.state.exp_avg_sq.embedding.weight", "rng_state/shard_0.0_1.1", "optimizer.step"),
    ],
    "FSDP": ["state.model.embed.weight.exp_avg", "param_groups.0.betas", "optim.lm_head.weight.exp_avg_sq"],
    "SGD": ["optimizer_states.0.state.0.momentum_buffer", "lm_head.momentum_buffer"],
}


@pytest.mark.parametrize("names", FLAT.values(), ids=FLAT)
def test_flat_names_of_optimizers_are_left_out(tmp_path: Path, names: list[str]) -> None:
    state = {**WEIGHTS, **{name: torch.full((3,), 9.0) for name in names}}
    save(state, tmp_path / "dcp/checkpoint-10")
    (tmp_path / "torch").mkdir()
    torch.save(state, tmp_path / "torch/checkpoint-10.pt")
    for checkpoint in (
        open_checkpoint(tmp_path / "dcp/checkpoint-10"),
        open_checkpoint(tmp_path / "torch/checkpoint-10.pt"),
    ):
        assert checkpoint.tensors.keys() == WEIGHTS.keys() and checkpoint.left_out == tuple(sorted(names))


NAMES = ["noise_scheduler.betas", "model.optimizer.weight", "step.weight", "scaler.loc", "state.weight", "expert.avg"]


def test_names_of_weights_that_sound_like_optimizers_are_kept(tmp_path: Path) -> None:
    state = {name: torch.ones(3) for name in NAMES}
    assert open_checkpoint(save(state, tmp_path / "a")).tensors.keys() == state.keys()


@pytest.mark.parametrize(
    "state, message",
    [
        (OTHER, "holds no weights, only other states: optimizer, step. Looked at the top level and, at any depth"),
        ({"app": {"policy": WEIGHTS}, "rng_state": torch.ones(5)}, "no weights, only other states: app, rng_state"),
        ({"app": {"model": WEIGHTS}, "ema": {"model": WEIGHTS}}, "under 'app.model' and 'ema.model'. Save one"),
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, "under 'model' and 'state_dict'"),
    ],
)
def test_none_or_several_weights_are_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(save(state, tmp_path / "a"))


def test_a_run_of_accelerate_is_averaged_like_one_of_safetensors(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_model(make_state(9), base)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for step in (10, 20, 30):
        save({"model": make_state(step)}, tmp_path / f"sharded/checkpoint-{step}/pytorch_model_fsdp_0")
        save({"optimizer": {"x": torch.ones(2)}}, tmp_path / f"sharded/checkpoint-{step}/optimizer_0")
        save_model(make_state(step), tmp_path / f"plain/checkpoint-{step}")
    for run in ("sharded", "plain"):
        average_checkpoints(tmp_path / run, EMA(update_freq=10), tmp_path / f"out-{run}", start=base)
    sharded, plain = ((tmp_path / f"out-{run}" / "model.safetensors").read_bytes() for run in ("sharded", "plain"))
    assert sharded == plain
    # Shards lie without their configuration: that of the base goes along.
    assert json.loads((tmp_path / "out-sharded" / "config.json").read_text()) == {"model_type": "llama"}
    assert inspect_run(tmp_path / "sharded").names == ("checkpoint-10", "checkpoint-20", "checkpoint-30")


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    cuts = [sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))) for size in shape]
    total = int(np.prod(shape))
    start, stop = sorted(draw(st.lists(st.integers(0, total), min_size=2, max_size=2, unique=True)))
    return shape, tuple(low for low, _ in cuts), tuple(high - low for low, high in cuts), start, stop


@given(st.data())
def test_chunks_cover_a_tensor_if_they_hold_each_element_once(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 3), max_size=3)))
    side = [st.integers(-1, size) for size in shape]
    chunks = data.draw(
        st.lists(st.tuples(st.tuples(*side), st.tuples(*[st.integers(0, s + 1) for s in shape])), max_size=5)
    )
    if data.draw(st.booleans()):  # a grid, perhaps with two of its boxes moved
        chunks = [(index, (1,) * len(shape)) for index in np.ndindex(shape)]
        for _ in range(data.draw(st.integers(0, 2))):
            i, j = (data.draw(st.integers(0, len(chunks) - 1)) for _ in range(2))
            chunks[i] = chunks[j]
        chunks = data.draw(st.permutations(chunks))
    counts, inside = np.zeros(shape, dtype=int), True
    for offsets, sizes in chunks:
        inside &= all(o >= 0 and o + s <= size for o, s, size in zip(offsets, sizes, shape, strict=True))
        counts[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    assert covers(shape, chunks) == (inside and bool((counts == 1).all()))


def test_chunks_that_overlap_and_leave_a_hole_are_refused(tmp_path: Path) -> None:
    folder = save({"a": torch.randn(4, 3)}, tmp_path / "a")

    def overlap(metadata: Any) -> Any:
        (box,) = metadata.state_dict_metadata["a"].chunks
        boxes = [copy.deepcopy(box) for _ in range(2)]
        for chunk, row in zip(boxes, (0, 1), strict=True):
            chunk.offsets, chunk.sizes = torch.Size([row, 0]), torch.Size([2, 3])
        metadata.state_dict_metadata["a"].chunks[:] = boxes
        return metadata

    _metadata(folder, overlap)
    with pytest.raises(CheckpointError, match="do not make up F32.*each element once"):
        open_checkpoint(folder)


@given(boxes())
def test_runs_are_the_elements_of_the_box_in_the_range(box: Any) -> None:
    shape, offsets, sizes, start, stop = box
    whole = np.arange(np.prod(shape)).reshape(shape)
    part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].reshape(-1)
    found = {}
    for where, within, count in Chunk(Path(), 0, 0, offsets, sizes).runs(shape, start, stop):
        assert np.array_equal(part[within : within + count], np.arange(where, where + count))
        found |= dict.fromkeys(range(where, where + count))
    assert sorted(found) == [value for value in part if start <= value < stop]


class Attack:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def _metadata(folder: Path, change: Callable[[Any], Any]) -> Path:
    path = folder / ".metadata"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))  # written by this test itself
    return folder


def _set(target: Any, name: str, value: Any) -> Any:
    object.__setattr__(target, name, value)
    return target


def _chunk(metadata: Any, name: str) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def _move(metadata: Any, **values: Any) -> Any:
    for name, value in values.items():
        _set(_chunk(metadata, "mlp.weight"), name, value)
    return metadata


def _exchange(metadata: Any) -> Any:
    one, other = _chunk(metadata, "mlp.weight"), _chunk(metadata, "scale")
    kept = dict(vars(one))
    for info, values in ((one, vars(other)), (other, kept)):
        for name, value in dict(values).items():
            _set(info, name, value)
    return metadata


def _drop_chunk(metadata: Any) -> Any:
    metadata.state_dict_metadata["mlp.weight"].chunks.clear()
    return metadata


def test_nothing_that_the_description_names_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = save(make_state(0), tmp_path / "a")
    assert pickle.loads(pickle.dumps(Attack(mark))) is None and mark.exists()  # it would work
    mark.unlink()
    _metadata(folder, lambda metadata: _set(metadata, "storage_meta", Attack(mark)))
    assert open_checkpoint(folder).tensors and not mark.exists()
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(CheckpointError, match="not the description of a checkpoint"):
        open_checkpoint(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: (d / ".metadata").write_bytes(b"\x80"), "not the description of a checkpoint.*damaged"),
        (lambda d: (d / ".metadata").unlink(), "sharded state without .metadata.*did not finish"),
        (lambda d: (d / "__0_0.distcp").unlink(), "__0_0.distcp': this file of the checkpoint is missing"),
        (lambda d: (d / "__0_0.distcp").write_bytes(b"x" * 99), "no tensor that torch.save wrote"),
        (lambda d: _metadata(d, _drop_chunk), "chunks of tensor 'mlp.weight' do not make up F32"),
        (lambda d: _metadata(d, lambda m: _move(m, relative_path="../x")), "outside of the checkpoint's folder"),
        (lambda d: _metadata(d, lambda m: _move(m, relative_path="a\0b")), r"a\\x00b': this file .* is missing"),
        (lambda d: _metadata(d, lambda m: _move(m, transform_descriptors=["zstd"])), "compressed"),
        (lambda d: _metadata(d, lambda m: _move(m, **vars(_chunk(m, "scale")))), "chunks of 'mlp.weight' and 'scale'"),
        (lambda d: _metadata(d, _exchange), r"is torch.float32 \[\].*expected"),
    ],
)
def test_what_is_wrong_with_it_is_said(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    folder = save(make_state(0), tmp_path / "a")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder).read_tensor("mlp.weight")


def test_a_chunk_stored_column_by_column_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save({"a": torch.randn(3, 4).t()}, tmp_path / "a"))
    with pytest.raises(CheckpointError, match=r"row by row\. Convert the checkpoint with"):
        checkpoint.read_tensor("a")


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    save({"a": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="float8_e4m3fn, which cannot be averaged without its scale"):
        open_checkpoint(tmp_path / "a")
    save({"model": make_state(0)}, tmp_path / "b" / "pytorch_model_fsdp_0")
    (tmp_path / "b" / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    with pytest.raises(CheckpointError, match="the weights are quantized"):
        open_checkpoint(tmp_path / "b")
