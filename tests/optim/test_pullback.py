"""The pull around other optimizers, and what theory says about a constant one."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, RMSprop

from lagless import BEMA, DEMA, EMA
from lagless.optim import PACE, BiasCorrectedAdamW, Pullback
from lagless.testing import OPTIMIZER_CHECKS
from lagless.theory import (
    PullRecursion,
    hidden_iterate,
    largest_stable_gain,
    optimal_gain,
    pulled_sgd,
)

OPTIMIZERS = {
    "AdamW": lambda params: Pullback(AdamW(params)),
    "AdamW, foreach, BEMA": lambda params: Pullback(AdamW(params, foreach=True), average=BEMA.paper(update_freq=1)),
    "AMSGrad": lambda params: Pullback(Adam(params, amsgrad=True)),
    "RMSprop": lambda params: Pullback(RMSprop(params, centered=True, momentum=0.5)),
    "Adagrad": lambda params: Pullback(Adagrad(params), average_dtype=torch.bfloat16),
    "SGD": lambda params: Pullback(SGD(params, lr=0.01, momentum=0.5), pullback=0.1, average=DEMA.paper(update_freq=2)),
}


@pytest.mark.parametrize("check", OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_conformance(name, check):
    if check.__name__ == "learning_rate_may_change" and name in ("SGD", "AdamW, foreach, BEMA"):
        pytest.skip("a constant gain pulls at learning rate 0 too; foreach of torch takes no tensor as learning rate")
    check(OPTIMIZERS[name])


def run(make, steps=8, dtype=torch.float64):
    weight = nn.Parameter(torch.linspace(-1.0, 2.0, 9, dtype=dtype).view(3, 3))
    optimizer = make([weight])
    for step in range(steps):
        weight.grad = torch.cos(weight.detach() + step)
        optimizer.step()
    return weight.detach(), optimizer.read()["0"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"average": EMA(decay=0.9), "clamp": False, "pullback": 20.0},
        {"average": EMA(update_freq=3, update_after=1), "gate_pullback": True, "pullback": 3.0},
        {"average": BEMA.paper(update_freq=2), "pullback": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "base", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": False, "maximize": True}], ids=str
)
def test_around_adamw_it_is_pace(settings, base):
    shared = {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    maximize = base.get("maximize", False)
    pace = run(lambda p: PACE(p, **shared, maximize=maximize, **settings))
    wrapped = run(lambda p: Pullback(AdamW(p, **shared, **base), **{"pullback": 0.15} | settings))
    for mine, other in zip(pace, wrapped, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("c", [0.0, 4.0, 40.0])
@pytest.mark.parametrize(
    "make, divisor",
    [
        (lambda p: RMSprop(p, lr=0.05), lambda s, t: s["square_avg"].sqrt() + 1e-8),
        (
            lambda p: RMSprop(p, lr=0.05, centered=True, eps=1e-3),
            lambda s, t: (s["square_avg"] - s["grad_avg"] ** 2).sqrt() + 1e-3,
        ),
        (lambda p: Adagrad(p, lr=0.05), lambda s, t: s["sum"].sqrt() + 1e-10),
        (lambda p: Adagrad(p, lr=0.05, lr_decay=0.5), lambda s, t: (s["sum"].sqrt() + 1e-10) * (1 + (t - 1) * 0.5)),
        (
            lambda p: Adam(p, lr=0.05, betas=(0.5, 0.9), amsgrad=True),
            lambda s, t: (s["max_exp_avg_sq"] / (1 - 0.9**t)).sqrt() + 1e-8,
        ),
        (lambda p: SGD(p, lr=0.05, momentum=0.9), None),
        (lambda p: Muon(p, lr=0.05), None),
    ],
    ids=["RMSprop", "RMSprop centered", "Adagrad", "Adagrad, lr_decay", "AMSGrad", "SGD", "Muon"],
)
def test_the_gain_is_that_of_the_base(make, divisor, c):
    if divisor is None:
        c *= 0.1
    start = torch.linspace(-1.0, 2.0, 9, dtype=torch.float64).view(3, 3)
    weight, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer, base = Pullback(make([weight]), pullback=c, average=EMA(ema_power=0.5, lag=1.0)), make([plain])
    average = start.clone()
    for step in range(1, 9):
        before = weight.detach().clone()
        plain.data.copy_(before)
        weight.grad = torch.cos(before + step)
        plain.grad = weight.grad.clone()
        optimizer.step()
        base.step()
        decay = (1 + step) ** -0.5
        gain = c * decay if divisor is None else 0.05 * c * decay / divisor(base.state[plain], step)
        expected = plain.detach() + torch.as_tensor(gain, dtype=torch.float64).clamp(max=1.0) * (average - before)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)
        average += decay * (weight.detach() - average)
        torch.testing.assert_close(optimizer.read()["0"], average, rtol=0, atol=1e-12)


def sgd(weight, lr, c, b):
    return Pullback(SGD([weight], lr=lr), pullback=c, average=EMA(decay=1.0 - b), clamp=False)


def test_it_is_the_recursion_of_the_theory_and_hides_plain_sgd():
    rng, b = np.random.default_rng(0), 0.2
    gains, rates = np.array([0.0, 0.3, 0.9, 1.0]), np.linspace(0.1, 0.05, 12)
    noise = rng.standard_normal((12, 4))
    count = iter(noise)
    states = list(pulled_sgd(lambda theta: np.tanh(theta) + next(count), np.arange(1.0, 5.0), rates, b, gains))
    weights = [nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in np.arange(1.0, 5.0)]
    optimizers = [sgd(w, 0.1, c, b) for w, c in zip(weights, gains, strict=True)]
    hidden = np.arange(1.0, 5.0)
    for k, rate in enumerate(rates):
        gradients = np.array([math.tanh(w.item()) for w in weights]) + noise[k]
        for w, g, optimizer in zip(weights, gradients, optimizers, strict=True):
            w.grad = torch.tensor([g], dtype=torch.float64)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        live = np.array([w.item() for w in weights])
        average = np.array([o.read()["0"].item() for o in optimizers])
        np.testing.assert_allclose(live, states[k + 1].iterate, rtol=0, atol=1e-13)
        np.testing.assert_allclose(average, states[k + 1].average, rtol=0, atol=1e-13)
        # The combination x does SGD with learning rate ηβ/(β + (1-β)c), for any gradients.
        hidden = hidden - rate * b / (b + (1 - b) * gains) * gradients
        np.testing.assert_allclose(
            hidden_iterate(states[k + 1]._replace(iterate=live, average=average), b, gains), hidden, rtol=0, atol=1e-13
        )


@pytest.mark.parametrize("a, b", [(0.5, 0.1), (1.2, 0.4), (1.9, 0.05)])
def test_it_diverges_from_the_largest_stable_gain_on(a, b):
    def size(c):
        weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = sgd(weight, a, c, b)
        for _ in range(4000):
            weight.grad = weight.detach().clone()  # curvature 1: a = η
            optimizer.step()
        return abs(weight.item())

    edge = largest_stable_gain(a, b)
    assert size(0.97 * edge) < 1e-3 and size(1.03 * edge) > 1e3


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, pytest.param("best", id="c*")])
def test_stationary_variance(c):
    # γ₀(c) of the average. 4 standard errors: the sample variance of n independent Gaussians has relative √(2/(n-1)).
    a, b, paths = 0.3, 0.1, 60_000
    c = optimal_gain(a, b) if c == "best" else c
    recursion = PullRecursion(a, b, c)
    steps = math.ceil(math.log(1e-4) / (2 * math.log(recursion.contraction)))
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(paths, dtype=torch.float64))
    optimizer = sgd(weight, 1.0, c, b)
    for _ in range(steps):
        weight.grad = a * weight.detach() + torch.randn(paths, dtype=torch.float64)
        optimizer.step()
    bound = 4 * (2 / (paths - 1)) ** 0.5
    assert abs(optimizer.read()["0"].var().item() / recursion.ema_variance - 1) < bound
    assert abs(weight.detach().var().item() / recursion.live_variance - 1) < bound


@pytest.mark.parametrize("base", [None, "PACE"])
def test_what_it_cannot_wrap_is_refused(base):
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="optimizer takes an optimizer|keeps no average"):
        Pullback(PACE([weight]) if base else weight)


def test_a_base_that_needs_a_closure_is_refused():
    with pytest.raises(TypeError, match="LBFGS evaluates its closure"):
        Pullback(torch.optim.LBFGS([nn.Parameter(torch.ones(2))]))


def test_a_base_is_wrapped_once():
    base = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="pullback=-1"):
        Pullback(base, pullback=-1.0)
    Pullback(base)
    with pytest.raises(ValueError, match="SGD has the settings of another wrapper"):
        Pullback(base, pullback=0.9)


def test_a_refused_wrapper_leaves_no_settings_behind():
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))], "pullback": -1.0}]
    base = SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match="pullback=-1"):
        Pullback(base)
    assert not any("average" in group for group in base.param_groups)


UNKNOWN = {
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "Adadelta": torch.optim.Adadelta,
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
    "BiasCorrectedAdamW": lambda params: BiasCorrectedAdamW(params, cross_fit="none", inverse_correction="none"),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_around_an_unknown_preconditioner_the_gain_must_be_said(make):
    start = torch.linspace(-1.0, 2.0, 9).view(3, 3)
    weight, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    with pytest.raises(ValueError, match="give gain='constant'"):
        Pullback(make([weight]))
    optimizer, base = Pullback(make([weight]), 0.5, EMA(decay=0.5), gain="constant"), make([plain])
    average = start.clone()
    for step in range(3):
        before = weight.detach().clone()
        plain.data.copy_(before)
        weight.grad = torch.cos(before + step)
        plain.grad = weight.grad.clone()
        optimizer.step()
        base.step()
        torch.testing.assert_close(weight.detach(), plain.detach() + 0.5 * (average - before))
        average.lerp_(weight.detach(), 0.5)


def test_a_constant_gain_can_be_had_around_adam():
    def run_with(gain):
        return run(lambda p: Pullback(AdamW(p, lr=0.05), 0.3, EMA(decay=0.5), gain=gain))[0]

    assert not torch.equal(run_with("constant"), run_with(None))
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="gain='adaptive'"):
        Pullback(AdamW([weight]), gain="adaptive")
    with pytest.raises(ValueError, match="give gain='constant'"):
        Pullback(torch.optim.NAdam([{"params": [weight], "gain": None}]), gain="constant")


def test_groups_may_be_added_to_the_base():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    base = SGD([first], lr=0.1)
    optimizer = Pullback(base, pullback=0.3)
    base.add_param_group({"params": [second]})
    optimizer.state_dict()
    for _ in range(3):
        first.grad, second.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
    assert torch.equal(first, second) and optimizer.read().keys() == {"0", "1"}
    with optimizer.applied():
        assert torch.equal(first, optimizer.read()["0"])
    resumed = Pullback(SGD([{"params": [p]} for p in (first, second)], lr=0.1))
    resumed.load_state_dict(optimizer.state_dict())
    assert [group["pullback"] for group in resumed.param_groups] == [0.3, 0.3]


def test_the_base_takes_in_groups_in_its_own_way():
    base = BiasCorrectedAdamW([("a", nn.Parameter(torch.ones(2)))])
    wrapped = Pullback(base, gain="constant")
    wrapped.add_param_group(
        {"params": [("b", nn.Parameter(torch.ones(2))), ("embed", nn.Parameter(torch.ones(2)))], "pullback": 0.7}
    )
    assert [group["cross_fit"] == "none" for group in base.param_groups] == [False, False, True]
    assert [group["pullback"] for group in base.param_groups] == [0.15, 0.7, 0.7]


def test_settings_are_checked_and_shared_with_the_base():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="pullback=nan"):
        Pullback(SGD([weight], lr=0.1), pullback=math.nan)
    base = SGD([{"params": [weight], "pullback": 0.7}], lr=0.1)
    optimizer = Pullback(base)
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    assert optimizer.param_groups[0]["pullback"] == 0.7
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    weight.grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    assert base.param_groups[0]["lr"] == 0.05
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3, "pullback": 0.2})
    assert [group["lr"] for group in base.param_groups] == [0.05, 0.3]
    assert [group["pullback"] for group in base.param_groups] == [0.7, 0.2]
    with pytest.raises(ValueError, match="pullback=-1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "pullback": -1})
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.optimizer.param_groups and optimizer.state is optimizer.optimizer.state
    with pytest.raises(ValueError, match="not the state of a Pullback"):
        optimizer.load_state_dict(SGD([weight], lr=0.1).state_dict())


def test_hooks_of_the_base_run_once_per_step():
    weight = nn.Parameter(torch.ones(2))
    base, calls = SGD([weight], lr=0.1), []
    optimizer = Pullback(base)
    base.register_step_post_hook(lambda *_: calls.append("base"))
    optimizer.register_step_post_hook(lambda *_: calls.append("wrapper"))
    weight.grad = torch.ones(2)
    optimizer.step()
    assert calls == ["base", "wrapper"]
