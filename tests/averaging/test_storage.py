"""Low-precision storage, and the compiled update."""

import math
import os

import pytest
import torch

from lagless import BEMA, DEMA, EMA, OUEMA, Averager, WindowAverage
from lagless.averaging import _buffers
from lagless.execution import KERNEL_SMALLEST, _lerp_c
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
        _buffers, "lerp_c", lambda rows, gains: (calls.append((len(rows), len(gains))), original(rows, gains))
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
    try:
        averager = Averager(weights, {"a": EMA(decay=0.9), "b": EMA(decay=0.8)})
        before = weights["w"].clone()
        weights["w"].add_(1.0)
        averager.update()
        assert _lerp_c._library() is None
        torch.testing.assert_close(averager.read("a")["w"], before + 0.1)
    finally:
        _lerp_c._library.cache_clear()


def test_blocks_cover_every_element_once():
    live = [
        torch.arange(n, dtype=torch.float32) for n in (1, _buffers._CPU_BLOCK - 1, 3, 2 * _buffers._CPU_BLOCK + 7, 0)
    ]
    blocks = list(_buffers._cut(live, [live, []], share=True))
    assert sum(p.numel() for block in blocks for p in block.live) == sum(t.numel() for t in live)
    assert all(sum(p.numel() for p in block.live) <= _buffers._CPU_BLOCK for block in blocks)
    for block in blocks:
        for a, b in zip(block.live, block.buffers[0], strict=True):
            assert a.data_ptr() == b.data_ptr() and a.shape == b.shape
