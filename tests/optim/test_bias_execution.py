"""Compiled steps and sums of the bias-corrected optimizers are those of the pure update, by one kernel or call each."""

import os

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import metrics

from lagless.execution import _adam_c
from lagless.execution._compiled import KERNEL_SMALLEST
from lagless.optim import BiasCorrectedAdamW, BiasCorrectedShampoo, BiasCorrectedSophia
from lagless.optim.bias_corrected import _adam_step
from lagless.updates import AdamForm, EmaWeights, Group, Moments, adam_folds, fed_moments, two_nodes

SIZE = KERNEL_SMALLEST + 37
ADAMW = {
    "leave one out": {},
    "none, post-EMA": {"cross_fit": "none", "inverse_correction": "post_ema"},
    "split, clipped": {"cross_fit": "split", "support_clip": 1.0, "update_clip": 0.5},
}
SETTINGS = {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1, "report_freq": 0}


def accumulate(weights, step, microbatches, weigh=lambda j: 1.0):
    """Gradients of mean 0.3 and deviation 1."""
    for j in range(microbatches):
        share = weigh(j) / microbatches
        generator = torch.Generator().manual_seed(100 * step + j)
        noise = [torch.randn(w.shape, generator=generator) + 0.3 for w in weights]
        sum((w * g.to(w.dtype)).sum() for w, g in zip(weights, noise, strict=True)).mul(share).backward()
        yield [g.double() for g in noise]


def adamw(weights, **settings):
    return BiasCorrectedAdamW([(f"w{i}", w) for i, w in enumerate(weights)], **SETTINGS | {"warm_start": 1} | settings)


def sophia(weights, **settings):
    settings = SETTINGS | {"hessian_freq": 2, "inverse_correction": "post_ema"} | settings
    return BiasCorrectedSophia([(f"w{i}", w) for i, w in enumerate(weights)], **settings)


def run(make, shapes, steps=4, dtype=torch.float32, unequal=None, **settings):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    optimizer = make(weights, **settings)

    def weigh(j):
        optimizer.set_microbatch_weight(unequal[j])
        return unequal[j]

    for step in range(steps):
        optimizer.zero_grad()
        for gradients in accumulate(weights, step, 3 if step == 2 else 4, *([weigh] if unequal else [])):
            if isinstance(optimizer, BiasCorrectedSophia) and optimizer.curvature_due:
                optimizer.add_curvature(sum((w * g).sum() for w, g in zip(weights, gradients, strict=True)))
        optimizer.step()
    return torch.cat([w.detach().flatten().double() for w in weights])


@pytest.fixture
def no_c(monkeypatch):
    """As on a device."""
    monkeypatch.setattr(_adam_step, "fits_adam_c", lambda *_: False)


@pytest.fixture
def in_c(monkeypatch):
    """The shapes of the tensors that are stepped by a call into C."""
    if _adam_c._library() is None:
        assert "CI" not in os.environ, "no C compiler"
        pytest.skip("no C compiler")
    step, shapes = _adam_step.adam_step_c, []
    monkeypatch.setattr(
        _adam_step, "adam_step_c", lambda form, row, k: shapes.append(row[0].shape) or step(form, row, k)
    )
    return shapes


IN_C = {
    "plain": {"cross_fit": "none"},
    "plain at first": {"warm_start": 2},
    "leave one out": {},
    "jackknife": {"inverse_correction": "jackknife"},
    "no epsilon": {"inverse_correction": "jackknife", "eps": 1e-12},
    "clipped": {"update_clip": 0.5},
}


@pytest.mark.parametrize("form", IN_C.values(), ids=IN_C)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("unequal", [None, (3.0, 1.0, 0.0, 2.0)], ids=str)
def test_one_call_into_c_is_the_eager_step(form, threads, unequal, in_c, monkeypatch):
    monkeypatch.setattr("lagless.execution._c._FEWEST", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    shapes = [(7, 43), (), (1,), (0,), (1000,), (3, 5, 7)]
    settings = {"dtype": torch.float64, "unequal": unequal, "warm_start": 0, **form}
    found = run(adamw, shapes, compile=True, **settings)
    assert len(in_c) == 4 * len(shapes)
    torch.testing.assert_close(found, run(adamw, shapes, **settings), rtol=1e-11, atol=1e-12)
    settings["dtype"] = torch.float32
    if "eps" not in form:  # where a fold without gradient has no preconditioner, rounding decides
        difference = run(adamw, shapes, compile=True, **settings) - run(adamw, shapes, **settings)
        assert difference.abs().quantile(0.99) < 2e-6


def test_equal_microbatches_have_no_negative_variance_in_c(in_c):
    weight = nn.Parameter(torch.randn(999, generator=torch.Generator().manual_seed(3)))
    before, optimizer = weight.detach().clone(), adamw([weight], warm_start=0, compile=True, weight_decay=0.0, eps=0.0)
    for _ in range(7):
        (weight * before).sum().div(7).backward()
    optimizer.step()
    assert len(in_c) == 1
    torch.testing.assert_close(weight.detach(), before - 0.05 * before.sign(), rtol=0, atol=1e-4)


def test_what_c_does_not_know_goes_elsewhere(in_c):
    settings = {"warm_start": 0, "compile": True}
    run(adamw, [(5, 7)], constants="reference", inverse_correction="jackknife", **settings)
    run(adamw, [(5, 7)], folds="skewed", **settings)
    run(adamw, [(5, 7)], cross_fit="none", inverse_correction="pre_ema", **settings)
    run(adamw, [(5, 7)], cross_fit="none", support_clip=1.0, **settings)
    run(adamw, [(5, 7)], dtype=torch.bfloat16, **settings)
    run(adamw, [(5, 7)], report_freq=1, **settings)
    assert in_c == []
    turned = nn.Parameter(torch.randn(7, 5).T)
    optimizer = adamw([turned], **settings)
    list(accumulate([turned], 0, 4))
    optimizer.step()
    assert in_c == []


@pytest.mark.usefixtures("no_c")
@pytest.mark.parametrize("form", ADAMW.values(), ids=ADAMW)
def test_compiled_adamw_is_the_eager_one(form):
    torch._dynamo.reset()
    metrics.reset()
    counters.clear()
    shapes = [(SIZE,), (300, 400)]
    compiled = run(adamw, shapes, compile=True, **form)
    # As many kernels as functions: nothing is cut in two.
    assert metrics.generated_kernel_count == counters["stats"]["unique_graphs"] > 1
    torch.testing.assert_close(compiled, run(adamw, shapes, **form), rtol=2e-5, atol=2e-5)
    assert not torch.equal(compiled, run(adamw, shapes, **form))


def test_compiled_bfloat16_is_the_eager_one():
    difference = (
        run(adamw, [(SIZE,)], dtype=torch.bfloat16, compile=True) - run(adamw, [(SIZE,)], dtype=torch.bfloat16)
    ).abs()
    # A rounding of the weights may fall on the other side; few do.
    assert difference.max() < 5e-2 and difference.mean() < 1e-3


@pytest.mark.parametrize("execution", ["no_c", "in_c"])
def test_compiled_leave_one_out_is_the_pure_update(execution, request):
    request.getfixturevalue(execution)
    theta = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(theta.clone())
    optimizer = adamw([weight], compile=True)
    theta, m, v = theta.double(), torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    for step in range(3):
        optimizer.zero_grad()
        g = torch.stack([gradients[0] for gradients in accumulate([weight], step, 4)])
        optimizer.step()
        mean = g.mean(0)
        form = AdamForm("leave_one_out") if step else AdamForm()
        groups = [Group(mean, two_nodes(mean, (g - mean).square().mean(0), 4))]
        update = adam_folds(form, groups, Moments(m, v), EmaWeights.at((0.9, 0.95), step + 1), 1e-2).update
        fed = fed_moments(form, groups)
        m, v = 0.9 * m + 0.1 * fed.m, 0.95 * v + 0.05 * fed.v
        theta = theta * (1 - 0.05 * 0.1) - 0.05 * update
    torch.testing.assert_close(weight.detach().double(), theta, rtol=2e-5, atol=2e-5)


def test_compiled_sophia_is_the_eager_one():
    compiled, eager = (run(sophia, [(SIZE,)], compile=c) for c in (True, False))
    torch.testing.assert_close(compiled, eager, rtol=2e-5, atol=2e-5)
    assert not torch.equal(compiled, eager)


@pytest.mark.usefixtures("no_c")
def test_compiled_shampoo_is_the_eager_one():
    """What is no matrix goes to AdamW."""

    def make(weights, compile):
        return BiasCorrectedShampoo([("w", weights[0])], lr=0.05, adamw_eps=1e-2, compile=compile)

    compiled, eager = (run(make, [(SIZE,)], compile=c) for c in (True, False))
    torch.testing.assert_close(compiled, eager, rtol=2e-5, atol=2e-5)
    assert not torch.equal(compiled, eager)


@pytest.mark.usefixtures("no_c")
def test_new_numbers_need_no_new_kernel():
    torch._dynamo.reset()
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((SIZE,), (300, 400), (2, 256, 256))]
    optimizer = adamw(weights, warm_start=0, compile=True)
    for step in range(6):
        group = optimizer.param_groups[0]
        group["lr"], group["weight_decay"], group["betas"] = 1e-3 / (step + 1), 0.01 * step, (0.9, 0.95 - 0.01 * step)
        optimizer.zero_grad()
        list(accumulate(weights, step, 3 + step % 4))
        optimizer.step()
        if step == 1:
            counters.clear()  # the first sums of all make their buffers; the step, new sums and further ones: 3 kernels
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("execution", ["no_c", "in_c"])
def test_autograd_notices_that_a_kernel_changed_the_weights(execution, request):
    request.getfixturevalue(execution)
    weight = nn.Parameter(torch.ones(SIZE))
    optimizer = adamw([weight], compile=True)
    loss = weight.square().sum()
    for _ in range(2):
        loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("no_c")
@pytest.mark.parametrize(
    "settings", [{"folds": "exact"}, {"report_freq": 1, "cross_fit": "none", "inverse_correction": "post_ema"}], ids=str
)
def test_what_cannot_be_one_kernel_goes_block_by_block(settings):
    settings = settings | {"warm_start": 0}
    difference = run(adamw, [(SIZE,)], compile=True, **settings) - run(adamw, [(SIZE,)], **settings)
    # Sums of squares are compiled all the same.
    assert difference.abs().max() < (2e-5 if "report_freq" in settings else 1e-30)
    assert torch.equal(run(adamw, [(10,)], compile=True), run(adamw, [(10,)]))
