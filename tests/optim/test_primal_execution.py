"""Every way to run a step of primal averaging gives the step of the pure update."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from lagless import BEMA, EMA, UniformAverage
from lagless.execution import _primal_c
from lagless.execution._compiled import KERNEL_SMALLEST
from lagless.optim import PrimalAveraging, _primal_one_pass, gpa, schedule_free
from lagless.optim._average_step import average_step
from lagless.testing import OPTIMIZER_CHECKS
from lagless.updates import PrimalConstants, primal_adamw

ADAMW = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = [(7, 43), (), (1,), (0,), (1000,), (3, 5, 7)]
CASES = {
    "plain": {"average": EMA(decay=0.7)},
    "falling, after burn-in, sparse, pulled": {
        "average": UniformAverage(update_freq=2, update_after=1),
        "pull": 0.3,
        "interpolation": 0.6,
    },
    "at the average": {"average": EMA(half_life_fraction=0.1), "interpolation": 1.0, "weight_decay_at_y": 0.2},
    "schedule": {"average": EMA(decay=0.9), "interpolation": lambda step: 0.5 + 0.5 / step},
}


def gradients(weights, step):
    generator = torch.Generator().manual_seed(step)
    return [
        0.1 * w.detach() + torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.dtype) for w in weights
    ]


def make(weights, case, base=None, **settings):
    return PrimalAveraging(torch.optim.AdamW(weights, **(ADAMW | (base or {}))), **(CASES[case] | settings))


def run(optimizer, weights, steps, first=1):
    for step in range(first, first + steps):
        for weight, grad in zip(weights, gradients(weights, step), strict=True):
            weight.grad = grad
        optimizer.step()


@pytest.fixture
def in_c():
    if _primal_c._library() is None:
        assert "CI" not in os.environ, "no C compiler"
        pytest.skip("no C compiler")


@pytest.fixture
def calls(monkeypatch):
    """How many rows C has stepped."""
    seen = []
    own = _primal_one_pass.primal_step_c
    monkeypatch.setattr(_primal_one_pass, "primal_step_c", lambda rows, k: (seen.append(len(rows)), own(rows, k)))
    return seen


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("base", [{}, {"maximize": True}], ids=str)
def test_one_pass_is_a_step_of_single_operations(case, dtype, tolerance, base, calls, in_c):
    start = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    found, expected = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    one, parts = make(found, case, base, compile=True), make(expected, case, base)
    for step in range(1, 13):
        run(one, found, 1, step)
        run(parts, expected, 1, step)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert calls == [len(SHAPES)] * 11  # the first step makes the state
    for a, b in zip(found, expected, strict=True):
        assert one.state[a].keys() == parts.state[b].keys()
        for name in ("z", "exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(one.state[a][name], parts.state[b][name], rtol=tolerance, atol=tolerance)
        assert one.state[a]["average_step"] == 12
        assert one.state[a]["interpolation"] == parts.state[b]["interpolation"]
    for a, b in zip(one.read().values(), parts.read().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_call_into_c_is_the_pure_update_bit_for_bit(case, dtype, threads, monkeypatch):
    monkeypatch.setattr("lagless.execution._c._FEWEST", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weights = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = make(weights, case, compile=True)
    run(optimizer, weights, 1)
    names = ("exp_avg", "exp_avg_sq", "z")
    rows = [[w.detach().clone(), *(optimizer.state[w][name].clone() for name in names)] for w in weights]
    # Torch's own square root on CPUs may be wrong by a unit in the last place; that of C and numpy never is.
    monkeypatch.setattr(
        torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy(), out=np.empty(x.shape, x.numpy().dtype)))
    )
    own, seen = _primal_one_pass._constants, []
    monkeypatch.setattr(_primal_one_pass, "_constants", lambda *given: seen.append(own(*given)) or seen[-1])
    for step in range(2, 7):
        given = gradients(weights, step)
        run(optimizer, weights, 1, step)
        k = PrimalConstants(*torch.tensor(seen[-1], dtype=torch.float64).to(dtype).unbind())
        assert seen[-1].average == average_step(optimizer.param_groups[0]["average"], step).weight
        for row, grad in zip(rows, given, strict=True):
            y, m, v, z = row
            row[:] = primal_adamw(y, grad, m, v, z, k)
    for weight, row in zip(weights, rows, strict=True):
        found = weight.detach(), *(optimizer.state[weight][name] for name in names)
        assert all(torch.equal(a, b) for a, b in zip(found, row, strict=True))


def test_a_kernel_of_torch_compile_is_the_pure_update(monkeypatch):
    monkeypatch.setattr(_primal_one_pass, "fits_primal_c", lambda row: False)
    start = torch.linspace(-1.0, 2.0, KERNEL_SMALLEST + 37)
    found, expected = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one, parts = make([found], "plain", compile=True), make([expected], "plain")
    run(one, [found], 4)
    run(parts, [expected], 4)
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6)
    assert found._version > 1


def watched(optimizer):
    optimizer.optimizer.register_step_post_hook(lambda *_: None)


def scheduled(optimizer):
    torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, factor=1.0)


ELSEWHERE = {
    "amsgrad": (lambda w: make(w, "plain", {"amsgrad": True}, compile=True), None),
    "sgd": (lambda w: PrimalAveraging(torch.optim.SGD(w, lr=0.1), EMA(decay=0.7), compile=True), None),
    "bema": (lambda w: make(w, "plain", average=BEMA(update_freq=1), compile=True), None),
    "small m": (lambda w: make(w, "plain", interpolation=0.3, compile=True), None),
    "hooks": (lambda w: make(w, "plain", compile=True), watched),
    "scheduler": (lambda w: make(w, "plain", compile=True), scheduled),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_does_not_fit_goes_by_single_operations_bit_for_bit(name, calls):
    make_one, prepare = ELSEWHERE[name]
    results = []
    for compile in (True, False):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        optimizer = make_one(weights)
        if prepare:
            prepare(optimizer)
        optimizer.param_groups[0]["compile"] = compile
        run(optimizer, weights, 4)
        results.append([w.detach() for w in weights])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not calls


def test_some_in_one_pass_and_others_not(calls, in_c):
    """A transposed parameter, one of 16 bits, and one without a gradient at first beside plain ones."""
    results = []
    for compile in (True, False):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(4, 6).mT), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3))]
        weights.append(nn.Parameter(torch.randn(8).bfloat16()))
        optimizer = make(weights, "plain", compile=compile)
        late = weights[2]
        for step in range(1, 7):
            for weight, grad in zip(weights, gradients(weights, step), strict=True):
                weight.grad = grad if weight is not late or step > 2 else None
            before = [w.grad for w in weights]
            optimizer.step()
            assert all(w.grad is g for w, g in zip(weights, before, strict=True))
        results.append([w.detach() for w in weights])
    torch.testing.assert_close(*results, rtol=3e-6, atol=3e-6)
    assert calls == [1] * 8  # five steps of one, three of the late one: theirs are of different numbers


@pytest.mark.parametrize("check", OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check):
    check(lambda params: make(params, "plain", compile=True))


@pytest.mark.parametrize(
    "member",
    [lambda base, **s: schedule_free(base, warmup_steps=2, **s), lambda base, **s: gpa(base, decay=0.8, **s)],
    ids=["schedule_free", "gpa"],
)
def test_members_of_the_family_go_in_one_pass(member, calls, in_c):
    results = []
    for compile in (True, False):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        optimizer = member(torch.optim.AdamW(weights, lr=0.05, betas=(0.0, 0.9)), compile=compile)
        run(optimizer, weights, 5)
        results.append([w.detach() for w in weights])
    torch.testing.assert_close(*results, rtol=3e-6, atol=3e-6)
    assert calls == [len(SHAPES)] * 4


def test_memory_is_z_y_m_v_only():
    weight = nn.Parameter(torch.randn(1000))
    optimizer = make([weight], "plain", compile=True)
    run(optimizer, [weight], 3)
    held = [t for t in optimizer.state[weight].values() if torch.is_tensor(t) and t.numel() > 1]
    assert sum(t.numel() for t in held) == 3 * weight.numel()
