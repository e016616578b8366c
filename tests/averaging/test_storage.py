"""Low-precision storage, and the compiled update."""

import math
import os

import pytest
import torch
from torch._inductor.exc import InductorError
from torch.utils._python_dispatch import TorchDispatchMode

from lagless import BEMA, DEMA, EMA, OUEMA, Averager, UniformAverage, WindowAverage
from lagless.averaging import _buffers
from lagless.execution import KERNEL_SMALLEST, RuleSet, _c, _compiled, _lerp_c, _lerp_compiled, lerp_compiled
from lagless.execution._rounding import stochastic_round_


def test_bfloat16_average_with_a_long_memory_moves():
    # 3,000 updates toward +10 % at decay .999 close 95 % of the gap; round-to-nearest closes none of it.
    start, gap = torch.ones(4096, dtype=torch.bfloat16), 0.1
    weights = {"w": start.clone()}
    averager = Averager(weights, EMA(decay=0.999), dtype=torch.bfloat16)
    nearest = start.clone()
    weights["w"].fill_(1.0 + gap)
    target = weights["w"].float().mean().item()
    for _ in range(3000):
        averager.update()
        nearest.lerp_(weights["w"], 0.001)
    assert averager.state_dict()["tensors"]["ema.0/w"].dtype == torch.bfloat16
    assert torch.equal(nearest, start)
    expected = target + (1.0 - target) * 0.999**3000
    # Each element ends with rounding noise of a few units in the last place (2^-7); the mean of 4096 is 64 times finer.
    mean = averager.read()["w"].mean().item()
    assert abs(mean - expected) < 5 * 2**-7 / math.sqrt(4096)


def test_stochastic_rounding_is_unbiased():
    values = torch.tensor([1.0 + 2**-9, -3.1415926, 1e-20, 6.5e4, -0.0, 1.0])
    n = 40_000
    target = torch.empty(n, len(values), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    stochastic_round_(target, values.repeat(n, 1), generator)
    rounded = target.double()
    spread = rounded.std(dim=0, unbiased=True) / math.sqrt(n)
    z = (rounded.mean(dim=0) - values.double()).abs() / spread.clamp(min=1e-300)
    exact = values.to(torch.bfloat16).double() == values.double()
    assert torch.all(z[~exact] < 4.5), "z-bound 4.5 on three inexact values"
    assert torch.equal(rounded[:, exact], values.double()[exact].expand(n, -1))


def test_stochastic_rounding_keeps_infinities_and_nan():
    values = torch.tensor([math.inf, -math.inf, math.nan])
    target = torch.empty(3, dtype=torch.bfloat16)
    stochastic_round_(target, values.clone(), torch.Generator().manual_seed(0))
    assert torch.equal(target[:2], values[:2].bfloat16()) and torch.isnan(target[2])


def test_noise_differs_between_steps_and_seeds():
    def average(seed):
        weights = {"w": torch.zeros(1000)}
        averager = Averager(weights, EMA(decay=0.9), dtype=torch.bfloat16, seed=seed)
        weights["w"].fill_(1.003)
        states = []
        for _ in range(2):
            averager.update()
            states.append(averager.state_dict()["tensors"]["ema.0/w"].clone())
        return states

    a, b = average(0), average(1)
    assert not torch.equal(a[0], b[0])
    assert torch.equal(a[0], average(0)[0]) and torch.equal(a[1], average(0)[1])


def test_float32_average_of_bfloat16_parameters():
    weights = {"w": torch.ones(64, dtype=torch.bfloat16)}
    averager = Averager(weights, EMA(decay=0.999))
    weights["w"].fill_(1.5)
    for _ in range(10):
        averager.update()
    torch.testing.assert_close(averager.read()["w"], torch.full((64,), 1.5 - 0.5 * 0.999**10))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_compiled_update_equals_the_eager_one(dtype, tolerance, monkeypatch):
    calls = []
    original = _buffers.lerp_compiled
    monkeypatch.setattr(_buffers, "lerp_compiled", lambda *arguments: (calls.append(1), original(*arguments)))
    rules = {
        "a": BEMA.paper(update_freq=1),
        "b": EMA(decay=0.9),
        "d": DEMA.paper(update_freq=1),
        "o": OUEMA.paper(update_freq=1),
    }
    weights = {"big": torch.randn(KERNEL_SMALLEST + 3).to(dtype), "small": torch.randn(5).to(dtype)}
    eager, compiled = Averager(weights, rules), Averager(weights, rules, compile=True)
    for n in range(3):
        weights["big"].add_(0.5 - n)
        eager.update()
        compiled.update()
    assert len(calls) == 3
    for name in rules:
        for key in weights:
            torch.testing.assert_close(compiled.read(name)[key], eager.read(name)[key], rtol=tolerance, atol=tolerance)


def test_compiled_update_does_not_recompile_when_numbers_change():
    weights = {"big": torch.randn(KERNEL_SMALLEST), "bigger": torch.randn(2 * KERNEL_SMALLEST)}
    averager = Averager(weights, {"a": EMA(), "b": EMA(ema_power=0.2)}, compile=True)
    averager.update()
    before = averager.read("a")["big"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(5):
            weights["big"].add_(1.0)
            averager.update()
    assert not torch.equal(averager.read("a")["big"], before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_call_into_c_equals_the_blocks(dtype, threads, monkeypatch):
    if _lerp_c._library() is None:
        assert "CI" not in os.environ, "no C compiler"
        pytest.skip("no C compiler")
    rules = {
        "a": BEMA.paper(update_freq=1),
        "b": EMA(decay=0.9),  # gains of at most .1
        "c": EMA(decay=0.3),  # and of .7, which torch.lerp treats otherwise
        "d": DEMA.paper(update_freq=1),
        "w": WindowAverage(window=2, update_freq=1),
        "s": EMA(decay=0.8, update_freq=2),
    }
    shapes = {"m": (70, 43), "s": (), "o": (1,), "none": (0,), "v": (5000,)}
    weights = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} | {"t": torch.randn(9, 8).t()}
    calls = []
    original = _buffers.lerp_c
    monkeypatch.setattr(
        _buffers, "lerp_c", lambda live, averages, *rest: (calls.append(len(live)), original(live, averages, *rest))
    )
    monkeypatch.setattr("lagless.execution._c._FEWEST", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    blocks, together = Averager(weights, rules), Averager(weights, rules)
    for _ in range(5):
        for name, weight in weights.items():
            weight.add_(torch.randn(weight.shape).to(weight.dtype))
            assert name != "t" or not weight.is_contiguous()
        blocks.update()
        with monkeypatch.context() as patch:
            patch.setattr(_buffers, "LERP_C_SMALLEST", 1)
            together.update()
    for name in rules:
        for key, value in blocks.read(name).items():
            found = together.read(name)[key]
            if dtype == torch.float64:  # where torch.lerp rounds once more
                torch.testing.assert_close(found, value, rtol=1e-14, atol=1e-14)
            else:
                assert torch.equal(found, value)
    assert bool(calls) == (dtype != torch.bfloat16)


def test_without_a_c_compiler_it_is_the_blocks(monkeypatch):
    monkeypatch.setenv("CC", "lagless-has-no-such-compiler")
    monkeypatch.setattr(_buffers, "LERP_C_SMALLEST", 1)
    weights = {"w": torch.randn(5)}
    _lerp_c._library.cache_clear()
    _c._warn_once.cache_clear()
    try:
        averager = Averager(weights, {"a": EMA(decay=0.9), "b": EMA(decay=0.8)})
        before = weights["w"].clone()
        weights["w"].add_(1.0)
        with pytest.warns(RuntimeWarning, match="'lagless-has-no-such-compiler' does not work.* LAGLESS_C=0"):
            averager.update()
        assert _lerp_c._library() is None
        torch.testing.assert_close(averager.read("a")["w"], before + 0.1)
    finally:
        _lerp_c._library.cache_clear()


def test_c_is_turned_off_by_a_variable(monkeypatch):
    monkeypatch.setenv("LAGLESS_C", "0")
    _lerp_c._library.cache_clear()
    try:
        assert _lerp_c._library() is None  # and no warning
        monkeypatch.setenv("LAGLESS_C", "no")
        _lerp_c._library.cache_clear()
        with pytest.raises(ValueError, match="LAGLESS_C='no'; set it to 0"):
            _lerp_c._library()
    finally:
        _lerp_c._library.cache_clear()


def test_c_refuses_tensors_that_are_not_like_the_first():
    if _lerp_c._library() is None:
        pytest.skip("no C compiler")
    live, bits = torch.zeros(4), torch.zeros(4, dtype=torch.int16)
    for average, low in [
        (torch.zeros(3), None),
        (torch.zeros(4).double(), None),
        (torch.zeros(8)[::2], None),
        (torch.zeros(4, device="meta"), None),
        (torch.zeros(4), bits[:3]),
        (torch.zeros(4), torch.zeros(4)),
    ]:
        with pytest.raises(ValueError, match="tensors for C"):
            _lerp_c.lerp_c([live], [[average]], [0.5], [low if low is None else [low]])


def test_any_number_of_rules_is_compiled_by_few_kernels():
    # torch gives up at the ninth recompilation of one function.
    generator = torch.Generator().manual_seed(0)
    live = torch.randn(KERNEL_SMALLEST, generator=generator)
    for count in range(1, 11):
        gains = torch.linspace(0.1, 0.9, count, dtype=torch.float64)
        averages = [torch.randn(KERNEL_SMALLEST, generator=generator) for _ in range(count)]
        expected = [average.lerp(live, gain) for average, gain in zip(averages, gains.tolist(), strict=True)]
        lerp_compiled(live, averages, gains)
        for average, wanted in zip(averages, expected, strict=True):
            torch.testing.assert_close(average, wanted, rtol=1e-6, atol=1e-6)


def test_without_a_compiler_a_compiled_update_is_the_eager_one(monkeypatch):
    calls = []

    def broken(function, **options):
        def run(*arguments):
            calls.append(1)
            raise InductorError(RuntimeError("no C++ compiler"), "there is none")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(_compiled, "_warned", False)
    _lerp_compiled._kernel.cache_clear()
    weights = {"w": torch.randn(KERNEL_SMALLEST)}
    rules = {"a": EMA(decay=0.9), "b": UniformAverage()}
    try:
        eager, compiled = Averager(weights, rules), Averager(weights, rules, compile=True)
        with pytest.warns(RuntimeWarning, match="torch.compile failed .*compile=True has no effect"):
            for n in range(3):
                weights["w"].add_(0.5 - n)
                eager.update()
                compiled.update()
        assert len(calls) == 1  # of the kernel for two averages, and not again
        for name in rules:
            torch.testing.assert_close(compiled.read(name)["w"], eager.read(name)["w"], rtol=1e-6, atol=1e-6)
    finally:
        _lerp_compiled._kernel.cache_clear()


def test_an_update_that_fails_is_not_counted(monkeypatch):
    weights = {"w": torch.randn(5)}
    averager = Averager(weights, EMA(decay=0.9))
    averager.update()
    with monkeypatch.context() as patch:
        patch.setattr(_buffers, "_update", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            averager.update()
    assert (averager.step, averager.updates()) == (1, 1)
    averager.update()
    assert (averager.step, averager.updates()) == (2, 2)


def test_a_step_without_an_update_does_not_look_at_the_tensors(monkeypatch):
    averager = Averager({"w": torch.randn(5)}, EMA(decay=0.9, update_freq=3))
    looked = []
    original = averager._live.tensors
    monkeypatch.setattr(
        averager._live, "tensors", lambda **options: (looked.append(averager.step), original(**options))[1]
    )
    for _ in range(6):
        averager.update()
    assert looked == [2, 5] and averager.updates() == 2


class Transfers(TorchDispatchMode):
    """Counts what lets the host wait for a device: copies between them, and tensors made there of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        tensors += [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        if len({t.device for t in tensors}) > 1 or function is torch.ops.aten._local_scalar_dense.default:
            self.found.append(function)
        return result


@pytest.mark.parametrize("storage", [None, torch.float64])
def test_an_update_on_a_device_does_not_wait_for_it(storage):
    # Meta tensors stand for those of a device. Blocks and steps must not add transfers.
    live = [torch.empty(70, 3, device="meta"), torch.empty(1 << 16, device="meta")]
    rules = {"u": UniformAverage(update_after=200), "d": DEMA.paper(update_freq=1), "w": WindowAverage(window=2)}
    followed = RuleSet(rules, 300)
    buffers = _buffers.AverageBuffers(live, followed.keys, dtype=storage, device=None, seed=0)
    with Transfers() as transfers:
        for step in range(301, 404):
            rows, followed.last = followed.advance(step)
            buffers.update(live, rows, step)
    assert any(buffers.low) == (storage is None)
    assert not transfers.found


def test_a_moved_model_is_followed_with_its_low_bits():
    live = [torch.empty(4, device="meta")]
    followed = RuleSet({"u": UniformAverage()}, 0)
    buffers = _buffers.AverageBuffers([torch.randn(4)], followed.keys, dtype=None, device=None, seed=0)
    buffers.keep_low(0)
    rows, _ = followed.advance(1)
    buffers.update(live, rows, 1)
    assert buffers.buffers[0][0].device == buffers.low[0][0].device == live[0].device


def test_blocks_cover_every_element_once():
    live = [
        torch.arange(n, dtype=torch.float32) for n in (1, _buffers._CPU_BLOCK - 1, 3, 2 * _buffers._CPU_BLOCK + 7, 0)
    ]
    parts = list(_buffers._cut([(i, t, [t, None]) for i, t in enumerate(live)], share=True))
    blocks = list(_buffers._blocks(parts, live, [live, []], []))
    assert sum(p.numel() for block in blocks for p in block.live) == sum(t.numel() for t in live)
    assert all(sum(p.numel() for p in block.live) <= _buffers._CPU_BLOCK for block in blocks)
    for block in blocks:
        for a, b in zip(block.live, block.buffers[0], strict=True):
            assert a.data_ptr() == b.data_ptr() and a.shape == b.shape
