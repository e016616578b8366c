from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes
from tests.model_files import State, make_state, save_model, save_sharded
from torch import Tensor

from lagless.checkpoints import CheckpointError, fingerprint, open_checkpoint
from lagless.execution import _product_c as kernel
from lagless.posthoc import _blocks as blocks, combine_checkpoints, stream_product
from lagless.posthoc._blocks import block_width, covering_rows, scratch_bytes

Make = Callable[..., Path]

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SMALL = 80_000  # bytes of memory per worker; cuts the largest test tensor into several blocks


def _open(run: Path) -> list:
    return [open_checkpoint(path) for path in sorted(run.iterdir())]


def _dense(states: list[State], weights: np.ndarray, name: str) -> Tensor:
    stacked = torch.stack([state[name].double() for state in states])
    return torch.einsum("gn,n...->g...", torch.from_numpy(weights), stacked)


def _check(states: list[State], weights: np.ndarray, sums: list[State], tolerance: float) -> None:
    for name, tensor in states[-1].items():
        if not tensor.is_floating_point():
            assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for found in sums)
            continue
        largest = max((float(state[name].double().abs().max()) for state in states if tensor.numel()), default=0.0)
        bound = tolerance * np.abs(weights).sum(axis=1).max() * largest
        for found, expected in zip(sums, _dense(states, weights, name), strict=True):
            assert found[name].shape == tensor.shape
            assert torch.allclose(found[name].double(), expected, rtol=0.0, atol=bound)


@pytest.mark.parametrize("memory", [SMALL, 2**30])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_equals_the_dense_product(make_run: Make, dtype: torch.dtype, workers: int, memory: int) -> None:
    states = [make_state(i, dtype) for i in range(4)]
    weights = np.random.default_rng(0).normal(size=(3, 4))
    sums = [
        {n: torch.zeros_like(t.double() if t.is_floating_point() else t) for n, t in states[0].items()} for _ in weights
    ]

    def keep(name: str, start: int, block: Tensor) -> None:
        for found, row in zip(sums, block, strict=True):
            found[name].view(-1)[start : start + row.numel()] = row

    stream_product(_open(make_run(states)), weights, keep, workers=workers, memory=memory * workers)
    _check(states, weights, sums, 2e-15 if dtype == torch.float64 else 1e-6)


def test_float64_accumulation_is_float64(make_run: Make) -> None:
    states = [make_state(i) for i in range(5)]
    weights = np.random.default_rng(1).normal(size=(2, 5))
    _check(states, weights, combine_checkpoints(_open(make_run(states)), weights, accumulate="float64"), 2e-15)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=13), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=4, max_size=4),
    rows=st.integers(1, 7),
    columns=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_any_shapes_and_mixtures_of_types(
    tmp_path_factory: pytest.TempPathFactory, shapes: list, dtypes: list, rows: int, columns: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(seed)
    states = []
    for i in range(columns):
        states.append({str(k): torch.randn(s, generator=generator).to(dtypes[k]) for k, s in enumerate(shapes)})
        save_model(states[-1], folder / f"checkpoint-{i}")
    weights = np.random.default_rng(seed).normal(size=(rows, columns))
    _check(states, weights, combine_checkpoints(_open(folder), weights, memory=2**21), 1e-6)


def test_constant_checkpoints_average_to_the_constant(make_run: Make) -> None:
    states = [make_state(7)] * 3
    sums = combine_checkpoints(_open(make_run(states)), [0.5, 0.25, 0.25])
    assert torch.equal(sums[0]["mlp.weight"], states[0]["mlp.weight"])


def test_a_start_of_another_type_is_converted(make_run: Make, tmp_path: Path) -> None:
    states = [make_state(0, torch.bfloat16), make_state(1), make_state(2)]
    save_model(states[0], tmp_path / "base")
    run = make_run(states[1:])
    sources = [open_checkpoint(tmp_path / "base"), *_open(run)]
    sums: dict[str, Tensor] = {}

    def keep(name: str, start: int, block: Tensor) -> None:
        sums[name] = block[0].reshape(states[1][name].shape).clone()

    stream_product(sources, [0.2, 0.3, 0.5], keep)
    _check(states, np.array([[0.2, 0.3, 0.5]]), [sums | {"nothing": states[0]["nothing"]}], 1e-6)


def test_a_default_device_of_the_caller_does_not_matter(make_run: Make) -> None:
    states = [make_state(i) for i in range(2)]
    run = make_run(states)
    with torch.device("meta"):
        sums = combine_checkpoints(_open(run), [0.5, 0.5])
        assert open_checkpoint(run / "checkpoint-10").read_tensor("scale").device.type == "cpu"
    _check(states, np.array([[0.5, 0.5]]), sums, 1e-6)


def test_sharded_equals_single_bit_for_bit(make_run: Make, tmp_path: Path) -> None:
    states = [make_state(i) for i in range(3)]
    for i, state in enumerate(states):
        save_sharded(state, tmp_path / "sharded" / f"checkpoint-{i}", i + 1)
    one, other = (combine_checkpoints(_open(p), [0.5, -0.5, 1.0])[0] for p in (make_run(states), tmp_path / "sharded"))
    assert all(torch.equal(one[name], other[name]) for name in states[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize("rows", [1, 9])
def test_every_byte_is_read_once_and_zero_columns_never(
    make_run: Make, monkeypatch: pytest.MonkeyPatch, rows: int, in_c: bool, dtype: torch.dtype
) -> None:
    states = [make_state(i, dtype) for i in range(4)]
    run = make_run(states)
    checkpoints = _open(run)
    reads: Counter[tuple[str, int]] = Counter()
    real, lock = os.preadv, threading.Lock()

    def note(descriptor: int, offset: int, count: int) -> None:
        with lock:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            reads.update((path, byte) for byte in range(offset, offset + count))

    def counting(descriptor: int, buffers: list, offset: int) -> int:
        count = real(descriptor, buffers, offset)
        note(descriptor, offset, count)
        return count

    fill = kernel.Pieces.fill

    def counting_fill(pieces: kernel.Pieces, files: np.ndarray, positions: np.ndarray) -> int:
        done = fill(pieces, files, positions) if in_c else 0
        for k in range(done):
            note(files[k], positions[k], pieces.views[k].nbytes)
        return done

    monkeypatch.setattr(os, "preadv", counting)
    monkeypatch.setattr(kernel.Pieces, "fill", counting_fill)
    weights = np.random.default_rng(0).normal(size=(rows, 4))
    weights[:, 1] = 0.0
    prints = stream_product(checkpoints, weights, lambda *_: None, memory=160_000, workers=2)
    assert set(reads.values()) == {1}
    assert Counter(path for path, _ in reads) == {
        str(c.files[0].resolve()): c.nbytes for i, c in enumerate(checkpoints) if i != 1
    }
    monkeypatch.undo()
    assert prints == [None if i == 1 else fingerprint(c) for i, c in enumerate(checkpoints)]


@pytest.mark.parametrize("limit, most", [(256, 5), (4, 0)])
def test_files_are_held_open_only_while_few(
    make_run: Make, monkeypatch: pytest.MonkeyPatch, limit: int, most: int
) -> None:
    states = [make_state(i) for i in range(5)]
    checkpoints = _open(make_run(states))
    monkeypatch.setattr("lagless.posthoc._weighted_sums.spare_descriptors", lambda: limit)
    before = _open_files()
    counts = []
    stream_product(checkpoints, np.full(5, 0.2), lambda *_: counts.append(_open_files() - before), workers=1)
    assert set(counts) == {most} and _open_files() == before
    _check(states, np.full((1, 5), 0.2), combine_checkpoints(checkpoints, np.full(5, 0.2)), 1e-6)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_values_that_are_not_finite_are_refused_by_name(
    make_run: Make, value: float, dtype: torch.dtype, where: int
) -> None:
    states = [make_state(i, dtype) for i in range(3)]
    states[where]["mlp.weight"][200, 3] = value
    run = make_run(states)
    weights = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1e-30]])  # no row alone sees all checkpoints
    pattern = (
        rf"checkpoint-{10 * (where + 1)}/model.safetensors: tensor 'mlp.weight' has {value} at element 1803.*--allow-n"
    )
    with pytest.raises(CheckpointError, match=pattern):
        combine_checkpoints(_open(run), weights)
    allowed = combine_checkpoints(_open(run), weights, allow_nonfinite=True)
    assert not torch.isfinite(allowed[where]["mlp.weight"][200, 3])
    assert torch.isfinite(allowed[where]["mlp.weight"][200, 4])


def test_finite_values_whose_sum_overflows_are_no_reason_to_refuse(make_run: Make) -> None:
    states = [{"a": torch.full((1000,), 3e38)}] * 2
    assert torch.equal(combine_checkpoints(_open(make_run(states)), [0.5, 0.5])[0]["a"], states[0]["a"])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_the_consumer_stops_all_and_leaves_no_trace(tmp_path: Path) -> None:
    for i in range(2):
        save_model({f"t{k}": torch.zeros(8) for k in range(400)}, tmp_path / f"checkpoint-{i}")
    checkpoints, seen = _open(tmp_path), []
    before = torch.get_num_threads(), threading.active_count(), _open_files()

    def fail(name: str, start: int, block: Tensor) -> None:
        seen.append(torch.get_num_threads())
        if len(seen) == 1:
            raise RuntimeError("stop here")
        time.sleep(0.001)

    with pytest.raises(RuntimeError, match="stop here"):
        stream_product(checkpoints, np.ones((2, 2)), fail, workers=2)
    assert (torch.get_num_threads(), threading.active_count(), _open_files()) == before
    assert set(seen) == {1} and len(seen) < 200


def test_progress_ends_at_the_total(make_run: Make) -> None:
    checkpoints = _open(make_run([make_state(i) for i in range(3)]))
    seen: list[tuple[int, int]] = []
    stream_product(
        checkpoints, [1.0, 0.0, 1.0], lambda *_: None, progress=lambda *p: seen.append(p), memory=SMALL, workers=1
    )
    total = checkpoints[0].nbytes + checkpoints[2].nbytes
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_file_rewritten_meanwhile_is_noticed(make_run: Make) -> None:
    run = make_run([make_state(i) for i in range(3)])

    def rewrite(name: str, start: int, block: Tensor) -> None:
        os.utime(run / "checkpoint-20" / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="checkpoint-20/model.safetensors changed while it was being read"):
        stream_product(_open(run), np.ones(3), rewrite)


@pytest.mark.parametrize(
    "weights, options, message",
    [
        ([[1.0, 2.0]], {}, r"shape \(1, 2\); it must be \(G, 3\)"),
        ([[[1.0]]], {}, "it must be"),
        (np.zeros((0, 3)), {}, "at least one row"),
        ([1.0, float("nan"), 0.0], {}, "NaN or infinity"),
        ([0.0, 0.0, 0.0], {}, "all are 0"),
        ([1.0, 1.0, 1.0], {"accumulate": "bfloat16"}, "accumulate='bfloat16'; it must be"),
        ([1.0, 1.0, 1.0], {"workers": 0}, "workers=0; it must be at least 1"),
        ([1.0, 1.0, 1.0], {"memory": 100}, "memory: .* bytes per worker are too few for 1 averages of 3 checkpoints"),
    ],
)
def test_bad_arguments(make_run: Make, weights: object, options: dict, message: str) -> None:
    checkpoints = _open(make_run([make_state(i) for i in range(3)]))
    with pytest.raises(ValueError, match=message):
        stream_product(checkpoints, weights, lambda *_: None, **options)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure the peak")
def test_memory_stays_within_its_bound(tmp_path: Path) -> None:
    count, memory = 6, 12 << 20
    for i in range(count):
        save_model({name: torch.zeros(1 << 21) for name in "abc"}, tmp_path / f"checkpoint-{i}")  # 24 MiB
    checkpoints, weights = _open(tmp_path), np.full((40, count), 1.0 / count)
    stream_product(checkpoints[:1], [1.0], lambda *_: None)  # what loads on the first call is not the product's
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    stream_product(checkpoints, weights, lambda *_: None, memory=memory)
    assert _peak() - before <= memory


def test_blocks_of_many_sizes_are_not_all_kept(tmp_path: Path) -> None:
    for i in range(3):
        save_model({f"t{n}": torch.zeros(n) for n in range(1, 40)}, tmp_path / f"checkpoint-{i}")
    prepared = []
    form = blocks.Workspace.form

    def noting(self: blocks.Workspace, *arguments: Any) -> Any:
        result = form(self, *arguments)
        prepared.append(len(self._prepared))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks.Workspace, "form", noting)
        stream_product(_open(tmp_path), np.ones(3), lambda *_: None, workers=1)
    assert len(prepared) == 39 and max(prepared) == blocks._KEPT


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([4, 8, 12]),
    st.sampled_from([[], [torch.bfloat16], [torch.float32, torch.float16]]),
    st.integers(10**7, 2**30),
)
def test_blocks_fit_into_the_memory(rows: int, columns: int, sum_bytes: int, converted: list, memory: int) -> None:
    scratch = scratch_bytes(columns, converted)
    assert scratch == max(8, columns * max([0, *(dtype.itemsize for dtype in converted)]))
    width = block_width(rows, columns, sum_bytes, scratch, memory, 4 << 20, 1 << 15)
    assert 0 < width * ((rows + columns) * sum_bytes + scratch + 8) <= memory


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000))
def test_covering_rows_see_every_column(rows: int, columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.normal(size=(rows, columns)) * (generator.random((rows, columns)) < 0.4)
    weights[0] += (weights == 0.0).all(axis=0)
    chosen = covering_rows(weights)
    assert (weights[chosen] != 0.0).any(axis=0).all() and len(chosen) <= min(rows, columns)
