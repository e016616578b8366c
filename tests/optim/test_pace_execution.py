"""Every way to run PACE's step gives the step of the pure update."""

import os

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lagless import BEMA, EMA
from lagless.execution import _pace_c
from lagless.execution._blocks import _CPU_BLOCK, blocks
from lagless.execution._compiled import KERNEL_SMALLEST
from lagless.execution._devices import counts
from lagless.execution._rounding import Noise
from lagless.optim import PACE, Pullback
from lagless.optim._average_step import average_step
from lagless.optim._executors import _rounded_at_random
from lagless.updates import PaceConstants, lerp, pace_constants, pulled_adamw

SIZE = KERNEL_SMALLEST + 37
SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def gradient(weight, step):
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
    return 0.1 * weight.detach() + noise


def pure_run(start, steps, average, pullback, clamp=True, maximize=False, **settings):
    """θ and ema of the specification in float64, rounding θ to the dtype of the start."""
    theta, ema = start.double(), start.double()
    m = v = torch.zeros_like(theta)
    for step in range(1, steps + 1):
        moves = average_step(average, step)
        k = pace_constants(
            step,
            pullback=pullback * moves.decay,
            clamp=clamp,
            maximize=maximize,
            average=moves.weight,
            **settings,
        )
        theta, m, v = pulled_adamw(theta, gradient(theta.to(start.dtype), step).double(), m, v, ema, k)
        theta = theta.to(start.dtype).double()
        ema = ema + k.average * (theta - ema)
    return theta, ema


CASES = {
    "plain": {"pullback": 2.0, "average": EMA(ema_power=0.5, lag=1.0)},
    "sparse updates, after burn-in": {"pullback": 2.0, "average": EMA(decay=0.8, update_freq=2, update_after=1)},
    "unclamped ascent": {"pullback": 20.0, "average": EMA(decay=0.5), "clamp": False, "maximize": True, "eps": 0.3},
}
EXECUTIONS = {
    "blocks": {},
    "device": {"capturable": True},
    "compiled": {"compile": True},
    "compiled on device": {"compile": True, "capturable": True},
}


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_execution_is_the_pure_update(case, execution, dtype, tolerance):
    start = torch.linspace(-1.0, 2.0, SIZE, dtype=dtype)
    weight = nn.Parameter(start.clone())
    optimizer = PACE([weight], **(SETTINGS | case | execution))
    followed = start.double()
    for step in range(1, 5):
        weight.grad = gradient(weight, step)
        optimizer.step()
        followed += average_step(case["average"], step).weight * (weight.detach().double() - followed)
    theta, ema = pure_run(start, steps=4, **(SETTINGS | case))
    # Differences of one rounding grow where a small denominator amplifies them; in bfloat16 a rounding of the weights
    # may fall on the other side, and few do.
    difference = (weight.detach().double() - theta).abs()
    assert difference.max() <= tolerance and difference.mean() < tolerance / 50
    average = optimizer.state[weight]["average"]
    assert average.dtype == torch.float32
    assert (average.double() - ema).abs().max() <= tolerance
    # The average is of the weights as they are, after rounding.
    assert (average.double() - followed).abs().max() < 2e-6


@pytest.fixture
def in_c():
    if _pace_c._library() is None:
        assert "CI" not in os.environ, "no C compiler"
        pytest.skip("no C compiler")


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_call_into_c_is_the_pure_update_bit_for_bit(case, dtype, threads, monkeypatch):
    monkeypatch.setattr("lagless.execution._c._FEWEST", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    # Torch's own square root on CPUs may be wrong by a unit in the last place; that of C and numpy never is.
    monkeypatch.setattr(
        torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy(), out=np.empty(x.shape, x.numpy().dtype)))
    )
    case = SETTINGS | case
    pure = {name: case[name] for name in ("lr", "betas", "eps", "weight_decay")}
    weights = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(7, 43), (), (1,), (0,), (1000,), (3, 5, 7)]]
    optimizer = PACE(weights, **case, compile=True)
    expected = [[w.detach().clone(), *[torch.zeros_like(w)] * 2, w.detach().clone()] for w in weights]
    for step in range(1, 6):
        moves = average_step(case["average"], step)
        k = pace_constants(
            step,
            pullback=case["pullback"] * moves.decay,
            clamp=case.get("clamp", True),
            maximize=case.get("maximize", False),
            average=moves.weight,
            **pure,
        )
        k = PaceConstants(*torch.tensor(k, dtype=torch.float64).to(dtype).unbind())
        for weight, row in zip(weights, expected, strict=True):
            weight.grad = gradient(weight, step)
            theta, m, v, ema = row
            row[:3] = pulled_adamw(theta, weight.grad, m, v, ema, k)
            row[3] = lerp(ema, row[0], k.average)
        optimizer.step()
    for weight, row in zip(weights, expected, strict=True):
        state = optimizer.state[weight]
        found = weight.detach(), state["exp_avg"], state["exp_avg_sq"], state["average"]
        assert all(torch.equal(a, b) for a, b in zip(found, row, strict=True))


@pytest.mark.usefixtures("in_c")
def test_what_is_not_finite_stays_so_in_c():
    weight = nn.Parameter(torch.ones(40))
    optimizer = PACE([weight], compile=True)
    weight.grad = torch.ones(40)
    weight.grad[7] = float("nan")
    optimizer.step()
    assert weight[7].isnan() and weight.isfinite().sum() == 39


@pytest.mark.parametrize("gradient", [torch._efficientzerotensor((8,)), torch._neg_view(torch.arange(1.0, 9.0))])
def test_gradients_that_are_not_what_lies_in_memory_do_not_go_to_c(gradient):
    def run(compile):
        weight = nn.Parameter(torch.ones(8))
        weight.grad = gradient
        PACE([weight], lr=0.1, compile=compile).step()
        return weight.detach()

    assert torch.equal(run(compile=True), run(compile=False))


def test_weights_that_are_not_finite_spoil_no_average_that_rests():
    weight = nn.Parameter(torch.ones(3))
    optimizer = PACE([weight], average=EMA(decay=0.9, update_freq=5), compile=True)
    weight.grad = torch.ones(3)
    optimizer.step()
    weight.data[1] = float("inf")
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["average"], torch.ones(3))


@pytest.mark.filterwarnings("ignore:the C compiler")
def test_without_a_c_compiler_it_is_the_kernel_of_torch(monkeypatch):
    monkeypatch.setenv("CC", "lagless-has-no-such-compiler")
    _pace_c._library.cache_clear()
    kernels = []
    monkeypatch.setattr("lagless.optim._pace.step_in_one_kernel", lambda row, constants: kernels.append(row))
    try:
        weight = nn.Parameter(torch.ones(SIZE))
        weight.grad = torch.ones(SIZE)
        PACE([weight], compile=True).step()
    finally:
        _pace_c._library.cache_clear()
    assert len(kernels) == 1


def test_new_numbers_need_no_new_kernel():
    torch._dynamo.reset()
    counters.clear()
    shapes = (SIZE,), (300, 400), (2, 256, 256)
    weights = [nn.Parameter(torch.randn(shape, dtype=torch.bfloat16)) for shape in shapes]
    optimizer = PACE(weights, compile=True, average=EMA(ema_power=0.5, lag=1.0, update_freq=2))
    for step in range(6):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        optimizer.param_groups[0]["pullback"] = 0.1 * step
        optimizer.param_groups[0]["weight_decay"] = 0.01 * step
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["C", "kernel"])
def test_autograd_notices_that_a_kernel_changed_the_weights(dtype):
    weight = nn.Parameter(torch.ones(SIZE, dtype=dtype))
    optimizer = PACE([weight], compile=True)
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_one_kernel_goes_block_by_block(monkeypatch):
    def run(dtype=torch.float32, **settings):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(size).to(dtype)) for size in (SIZE, 10)]
        optimizer = PACE(weights, **settings)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        return torch.cat([w.detach() for w in weights])

    bema = {"average": BEMA.paper(update_freq=1)}
    assert torch.equal(run(compile=True, **bema), run(**bema))
    kernels = []
    monkeypatch.setattr("lagless.optim._pace.step_in_one_kernel", lambda row, constants: kernels.append(row[0].numel()))
    kernel, eager = run(torch.bfloat16, compile=True), run(torch.bfloat16)
    assert torch.equal(kernel[SIZE:], eager[SIZE:]) and kernels == [SIZE] * 3


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
def test_a_bfloat16_average_is_rounded_without_bias(execution):
    # Every value stands at a random place between two bfloat16 numbers; the mean error of n roundings is below 4 of its
    # standard errors, which are at most half of the spacing 2^-7 over √n. Rounding to nearest would never move at all.
    torch.manual_seed(0)
    start = torch.ones(SIZE)
    weight = nn.Parameter(start.clone())
    optimizer = PACE([weight], lr=0.0, pullback=0.0, average=EMA(decay=0.99), average_dtype=torch.bfloat16, **execution)
    weight.grad = torch.zeros(SIZE)
    weight.data.add_(torch.rand(SIZE) * 0.2 - 0.1)
    optimizer.step()
    state = optimizer.state[weight]
    for _ in range(20):
        state["average"].fill_(1.0)
        optimizer.step()
        exact = 1.0 + 0.01 * (weight.detach().double() - 1.0)
        error = state["average"].double() - exact
        assert state["average"].dtype == torch.bfloat16
        assert error.abs().max() <= 2**-7 and abs(error.mean()) < 4 * 2**-8 / SIZE**0.5
    state["average"].fill_(float("inf"))
    optimizer.step()
    assert not torch.isfinite(state["average"]).any()


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
def test_recording_goes_block_by_block(execution):
    weight = nn.Parameter(torch.randn(SIZE))
    optimizer = PACE([weight], lr=torch.tensor(1e-3), **execution)
    weight.grad = torch.ones_like(weight)
    with optimizer.recording() as statistics:
        optimizer.step()
    assert statistics.read()["pull_norm"] == 0.0 < statistics.read()["update_norm"]


@pytest.mark.parametrize("average", [EMA(), EMA(decay=0.9, update_freq=3, update_after=2)], ids=str)
def test_on_the_device_nothing_waits_for_it(average):
    # A fake tensor has no values: whatever asks for one fails.
    def step(**settings):
        with FakeTensorMode():
            weights = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 2))]
            rate = torch.tensor(0.1)
            optimizer = PACE(weights, lr=rate, average=average, gate_pullback=True, **settings)
            for _ in range(3):
                for weight in weights:
                    weight.grad = torch.randn_like(weight)
                optimizer.step()

    step(capturable=True)
    with pytest.raises(DataDependentOutputException):
        step()


class LargestNew(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        for t in tensors_in(out):
            if t.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


def tensors_in(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3 * _CPU_BLOCK + 5,), (1025, 1024)], ids=["one line", "transposed"])
@pytest.mark.parametrize(
    "settings",
    [
        {"average": BEMA.paper(update_freq=1)},
        {"capturable": True},
        {"capturable": True, "average_dtype": torch.bfloat16},
    ],
    ids=["blocks", "device", "device, bfloat16 average"],
)
def test_temporaries_are_as_large_as_a_block(dtype, shape, settings):
    weight = nn.Parameter(torch.randn(shape, dtype=dtype).t())
    optimizer = PACE([weight], **settings)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    with LargestNew() as largest:
        optimizer.step()
    assert 0 < largest.elements <= _CPU_BLOCK


def test_blocks_elsewhere_are_a_small_share_of_the_weights():
    # Half a dozen lists of a block are temporary; weights and state are four times the weights.
    for shapes in ([(50257, 768), *[(768, 3072)] * 24], [(50257, 1600), *[(1600, 6400)] * 144]):
        rows = [(torch.empty(shape, device="meta"),) for shape in shapes]
        sizes = [sum(t.numel() for t in block[0]) for block in blocks(rows)]
        assert sum(sizes) == sum(row[0].numel() for row in rows)
        assert 6 * max(sizes) / (4 * sum(sizes)) < 0.02 and len(sizes) < 1000


def test_noise_of_pieces_is_that_of_the_whole():
    value, step = torch.rand(1000) + 1.0, torch.tensor(3.0)
    whole = _rounded_at_random(value, step, 0)
    assert torch.equal(whole[600:], _rounded_at_random(value[600:], step, 600))
    assert not torch.equal(whole[600:], _rounded_at_random(value[600:], step, 0))


def test_pieces_of_a_transposed_tensor_take_the_step_of_its_copy():
    def run(weight, **settings):
        weight = nn.Parameter(weight)
        optimizer = PACE([weight], lr=0.05, **settings)
        for step in range(3):
            weight.grad = torch.cos(weight.detach() + step)
            optimizer.step()
        return weight.detach()

    start = torch.randn(1025, 1024, generator=torch.Generator().manual_seed(0))
    for settings in ({}, {"capturable": True}):
        assert torch.equal(run(start.clone().t(), **settings), run(start.t().contiguous(), **settings))


class ScalarReads(TorchDispatchMode):
    """Counts the numbers that are asked of tensors: on a device each one is a wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def many(make):
    weights = [nn.Parameter(torch.ones(3)) for _ in range(20)]
    optimizer = make(weights)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        PACE,
        lambda params: Pullback(torch.optim.RMSprop(params)),
        lambda params: Pullback(torch.optim.AdamW(params, foreach=True)),
    ],
    ids=["PACE", "RMSprop", "AdamW"],
)
def test_counts_are_not_asked_one_by_one(make):
    optimizer = many(make)
    wrapped = getattr(optimizer, "optimizer", None)
    for use in (optimizer.step, optimizer.read, optimizer.eval):
        alone = 0
        if use == optimizer.step and wrapped is not None:
            with ScalarReads() as reads:
                wrapped.step()
            alone = reads.count
        with ScalarReads() as reads:
            use()
        assert reads.count - alone <= 1


def test_counts_come_back_in_order():
    assert counts([3, torch.tensor(1.0), torch.tensor([2.0]), torch.tensor(5), 0]) == [3, 1, 2, 5, 0]
    assert counts([]) == []


class WidestMade(TorchDispatchMode):
    """Whether any operation makes a float64 tensor with elements of the device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.float64 = device, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.float64 |= any(t.dtype == torch.float64 and t.device.type == self.device for t in tensors_in(out))
        return out


@pytest.mark.parametrize("average", [EMA(), EMA(half_life_fraction=0.2, update_freq=2)], ids=str)
def test_a_device_without_float64_is_not_asked_for_it(average, monkeypatch):
    monkeypatch.setattr("lagless.execution._devices.WITHOUT_FLOAT64", ("cpu",))
    kernels = []
    monkeypatch.setattr("lagless.optim._pace.fits_pace_c", lambda row: False)  # as on a device
    monkeypatch.setattr("lagless.optim._pace.step_in_one_kernel", lambda row, constants: kernels.append(constants))
    for settings in ({"capturable": True}, {"compile": True}, {}):
        weight = nn.Parameter(torch.ones(SIZE))
        optimizer = PACE([weight], average=average, **settings)
        weight.grad = torch.ones_like(weight)
        with WidestMade("cpu") as made:
            optimizer.step()
            if not settings:
                with optimizer.recording():
                    optimizer.step()
        assert not made.float64
    assert [constants.dtype for constants in kernels] == [torch.float32]


def test_only_bfloat16_averages_need_a_generator(monkeypatch):
    made = []
    original = Noise.on
    monkeypatch.setattr(Noise, "on", lambda self, device: (made.append(1), original(self, device))[1])
    for make in (PACE, lambda params, **settings: Pullback(torch.optim.AdamW(params), **settings)):
        for dtype in (None, torch.bfloat16):
            made.clear()
            many(lambda params, make=make, dtype=dtype: make(params, average_dtype=dtype))
            assert bool(made) == (dtype is not None)


@pytest.mark.parametrize("sizes", [[0], [3], [_CPU_BLOCK], [_CPU_BLOCK + 1, 2, 0], [5, 2 * _CPU_BLOCK, 7]], ids=str)
def test_blocks_cover_everything_once(sizes):
    rows = [(torch.zeros(n), torch.arange(n)) for n in sizes]
    for weights, indices in blocks(rows):
        assert sum(w.numel() for w in weights) <= _CPU_BLOCK
        for weight, index in zip(weights, indices, strict=True):
            weight.add_(1.0 + index)
    for (weight, index), n in zip(rows, sizes, strict=True):
        assert torch.equal(weight, 1.0 + index) and weight.numel() == n
    assert list(blocks([])) == []
