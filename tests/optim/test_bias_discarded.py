"""Microbatches whose gradients were thrown away do not count; gradients that were changed in between are refused."""

import pytest
import torch

from lagless.optim import BiasCorrectedAdamW, BiasCorrectedShampoo, BiasCorrectedSophia

OPTIMIZERS = {
    **{
        f"adamw {cross_fit} {folds}": lambda ps, c=cross_fit, f=folds: BiasCorrectedAdamW(
            ps, lr=0.05, warm_start=0, cross_fit=c, folds=f
        )
        for cross_fit, folds in (
            ("leave_one_out", "moments"),
            ("leave_one_out", "skewed"),
            ("leave_one_out", "exact"),
            ("split", "moments"),
            ("symmetric", "moments"),
        )
    },
    "sophia": lambda ps: BiasCorrectedSophia(ps, lr=0.05, hessian_freq=1),
    "shampoo": lambda ps: BiasCorrectedShampoo(ps, lr=0.05, damping=1e-2, root_freq=1, inverse_correction="post_ema"),
}


def zero(tensors):
    for tensor in tensors:
        tensor.zero_()


def set_each(parameters, gradient):
    for p in parameters:
        p.grad = gradient(p)


DISCARDED = {
    "optimizer.zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer.zero_grad(False)": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad(False)": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "p.grad = None": lambda model, optimizer: set_each(model.parameters(), lambda p: None),
    "p.grad = zeros": lambda model, optimizer: set_each(model.parameters(), torch.zeros_like),
    "p.grad.zero_()": lambda model, optimizer: zero(p.grad for p in model.parameters()),
    "p.grad.data.zero_()": lambda model, optimizer: zero(p.grad.data for p in model.parameters()),
    "p.grad *= 0": lambda model, optimizer: [p.grad.mul_(0.0) for p in model.parameters()],
}
CHANGED = {
    "clipped": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "clipped by value": lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3),
    "halved": lambda model: [p.grad.mul_(0.5) for p in model.parameters()],
    "halved data": lambda model: [p.grad.data.mul_(0.5) for p in model.parameters()],
    "replaced": lambda model: set_each(model.parameters(), lambda p: p.grad * 2),
    "sign": lambda model: [p.grad.neg_() for p in model.parameters()],
    "one to zero": lambda model: model[0].weight.grad.zero_(),
    "one to None": lambda model: setattr(model[0].weight, "grad", None),
    "one element": lambda model: model[0].weight.grad[1, 1].mul_(3.0),
    "noise": lambda model: model[1].weight.grad.add_(torch.ones_like(model[1].weight)),
}


def new(name):
    layers = [torch.nn.Linear(n, m, bias=False, dtype=torch.float32) for n, m in ((4, 3), (3, 2))]
    model = torch.nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1.0, 1.0, p.numel(), dtype=torch.float32).view(p.shape))
    return model, OPTIMIZERS[name](model.named_parameters())


def microbatches(model, optimizer, seed, count):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        q = torch.randn(2, 4, dtype=torch.float32, generator=generator)
        if getattr(optimizer, "curvature_due", False):
            optimizer.add_curvature(model(q).sum() + model(2 * q).square().sum())
        model(q).square().sum().backward()


def steps(name, interrupt):
    model, optimizer = new(name)
    for seed in range(3):
        interrupt(model, optimizer, seed)
        microbatches(model, optimizer, seed, 4)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("way", DISCARDED)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_discarded_microbatches_do_not_count(name, way, count):
    def interrupt(model, optimizer, seed):
        microbatches(model, optimizer, 100 + seed, count)
        DISCARDED[way](model, optimizer)

    expected = steps(name, lambda *_: None)
    for found, wanted in zip(steps(name, interrupt), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("way", CHANGED)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_changed_in_between_are_refused(name, way):
    model, optimizer = new(name)
    microbatches(model, optimizer, 0, 2)
    before = [p.detach().clone() for p in model.parameters()]
    CHANGED[way](model)
    with pytest.raises(RuntimeError, match="changed between two microbatches.*once, after the last backward"):
        microbatches(model, optimizer, 1, 1)
    with pytest.raises(RuntimeError, match=r"call optimizer.zero_grad\(\)"):
        microbatches(model, optimizer, 1, 1)
    optimizer.zero_grad()
    microbatches(model, optimizer, 2, 4)
    optimizer.step()
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_clip_that_clips_nothing_is_no_change(name):
    def clip(model, optimizer, seed):
        microbatches(model, optimizer, 100 + seed, 2)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)

    expected = steps(name, lambda model, optimizer, seed: microbatches(model, optimizer, 100 + seed, 2))
    assert all(map(torch.equal, steps(name, clip), expected))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_after_the_last_microbatch_is_no_change(name):
    model, optimizer = new(name)
    for seed in range(2):
        microbatches(model, optimizer, seed, 4)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
        model.zero_grad(set_to_none=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_microbatch_that_is_not_finite_is_no_change(name, value):
    model, optimizer = new(name)
    before = [p.detach().clone() for p in model.parameters()]
    microbatches(model, optimizer, 0, 1)
    (model(torch.ones(2, 4, dtype=torch.float32)).sum() * value).backward()
    microbatches(model, optimizer, 1, 2)
    optimizer.step()  # is skipped
    assert all(map(torch.equal, before, model.parameters()))
