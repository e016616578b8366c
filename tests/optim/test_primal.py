"""Primal averaging against published traces, members of the family, and the conformance suite."""

from __future__ import annotations

import copy
import math

import pytest
import schedulefree
import torch
from torch import nn

from lagless import BEMA, DEMA, EMA, Averager, UniformAverage
from lagless.optim import PACE, BiasCorrectedAdamW, PrimalAveraging, gpa, lookahead, schedule_free
from lagless.rules import WarmupAverage
from lagless.testing import OPTIMIZER_CHECKS

CURVATURE = torch.tensor([[3.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.3]], dtype=torch.float64)
OPTIMUM = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
FAST = EMA(decay=0.6)


def adamw(params, **options):
    return torch.optim.AdamW(params, lr=0.01, **options)


OPTIMIZERS = {
    "adamw": lambda p: PrimalAveraging(adamw(p), FAST),
    "adamw, averages stored": lambda p: PrimalAveraging(adamw(p), FAST, interpolation=0.3),
    "adamw, no interpolation": lambda p: PrimalAveraging(adamw(p), FAST, interpolation=0.0),
    "sgd at the average": lambda p: PrimalAveraging(torch.optim.SGD(p, lr=0.01), FAST, interpolation=1.0),
    "momentum": lambda p: PrimalAveraging(torch.optim.SGD(p, lr=0.01, momentum=0.5), EMA(decay=0.9)),
    "rmsprop, bema": lambda p: PrimalAveraging(
        torch.optim.RMSprop(p, lr=0.01), BEMA.paper(update_freq=1), interpolation=0.5
    ),
    "dema at every second step": lambda p: PrimalAveraging(adamw(p), DEMA.paper(update_freq=2), interpolation=0.7),
    "lookahead": lambda p: lookahead(adamw(p), steps=2),
    "pulled": lambda p: PrimalAveraging(adamw(p), FAST, interpolation=0.8, pull=0.3),
    "decay at y": lambda p: PrimalAveraging(adamw(p, weight_decay=0.0), FAST, weight_decay_at_y=0.1),
    "schedule": lambda p: PrimalAveraging(adamw(p), FAST, interpolation=annealed),
    "bias-corrected": lambda p: PrimalAveraging(BiasCorrectedAdamW(p, lr=0.01, warm_start=0), FAST),
}


def annealed(step: int) -> float:
    """From where the average is recovered to where it is not."""
    return max(0.0, 0.9 - 0.15 * step)


@pytest.mark.parametrize("check", OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_conformance(name, check):
    check(OPTIMIZERS[name], 2 if name == "bias-corrected" else 1)


def noisy_run(optimizer, weight, steps=12, seed=0):
    """The values of y, and of the average, along a noisy quadratic."""
    generator = torch.Generator().manual_seed(seed)
    path = []
    for _ in range(steps):
        noise = torch.randn(3, generator=generator, dtype=torch.float64)
        weight.grad = CURVATURE @ (weight.detach() - OPTIMUM) + 0.3 * noise
        path.append(weight.detach().clone())
        optimizer.step()
    return path


def start():
    return nn.Parameter(torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64))


def average_of(optimizer):
    return next(iter(optimizer.read().values()))


@pytest.mark.parametrize("m", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("pull", [0.0, 0.4])
@pytest.mark.parametrize("rule", [EMA(decay=0.8), EMA(decay=0.5, update_freq=3), BEMA.paper(update_freq=1)], ids=str)
def test_the_three_sequences(m, pull, rule):
    weight = start()
    optimizer = PrimalAveraging(torch.optim.SGD([weight], lr=0.1), rule, interpolation=m, pull=pull)
    z = weight.detach().clone()
    iterates = Averager({"z": z}, rule)  # updated by hand, with z as it is before it is pulled
    held, x = {"z": z}, z.clone()
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 13):
        noise = torch.randn(3, generator=generator, dtype=torch.float64)
        y = (1 - m) * z + m * x
        torch.testing.assert_close(weight.detach(), y, rtol=1e-12, atol=1e-13)
        weight.grad = CURVATURE @ (weight.detach() - OPTIMUM) + 0.3 * noise
        held["z"].sub_(0.1 * (CURVATURE @ (y - OPTIMUM) + 0.3 * noise))
        optimizer.step()
        iterates.update()
        if rule.schedule.updates(t):
            x = iterates.read()["z"].clone()
            torch.testing.assert_close(average_of(optimizer) if not pull else x, x, rtol=1e-12, atol=1e-13)
            if isinstance(rule, EMA):
                z.add_(x - z, alpha=pull)
            elif pull:
                return  # what BEMA adds to its ema depends on z as it is after the pull: see the next test


def test_without_interpolation_it_is_the_optimizer_with_an_average_beside_it():
    weight, plain = start(), start()
    rule = EMA(decay=0.7)
    base = torch.optim.AdamW([plain], lr=0.1)
    averager = Averager({"w": plain}, rule)
    averager.attach(base)
    optimizer = PrimalAveraging(torch.optim.AdamW([weight], lr=0.1), rule, interpolation=0.0)
    for a, b in zip(noisy_run(optimizer, weight), noisy_run(base, plain), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(average_of(optimizer), averager.read()["w"])


@pytest.mark.parametrize("decay, warmup", [(0.0, 0), (0.1, 0), (0.0, 5)])
def test_schedule_free_is_the_package(decay, warmup):
    weight, theirs = start(), start()
    base = torch.optim.Adam([weight], lr=0.1, betas=(0.0, 0.95))
    optimizer = schedule_free(base, warmup_steps=warmup, weight_decay_at_y=decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda t: min((t + 1) / warmup, 1.0) if warmup else 1.0)
    package = schedulefree.AdamWScheduleFree(
        [theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=decay, warmup_steps=warmup, foreach=False
    )
    package.train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        noise = 0.3 * torch.randn(3, generator=generator, dtype=torch.float64)
        for w, o in ((weight, optimizer), (theirs, package)):
            w.grad = CURVATURE @ (w.detach() - OPTIMUM) + noise
            o.step()
        scheduler.step()
        torch.testing.assert_close(weight, theirs, rtol=1e-12, atol=1e-13)
    package.eval()
    torch.testing.assert_close(average_of(optimizer), theirs.detach(), rtol=1e-12, atol=1e-13)


def test_lookahead_by_its_definition():
    weight, fast = start(), start()
    optimizer = lookahead(torch.optim.SGD([weight], lr=0.1), steps=3, alpha=0.5)
    generator, slow = torch.Generator().manual_seed(2), fast.detach().clone()
    for t in range(1, 13):
        noise = 0.3 * torch.randn(3, generator=generator, dtype=torch.float64)
        weight.grad = CURVATURE @ (weight.detach() - OPTIMUM) + noise
        optimizer.step()
        with torch.no_grad():
            fast.sub_(0.1 * (CURVATURE @ (fast - OPTIMUM) + noise))
            if t % 3 == 0:
                slow += 0.5 * (fast - slow)
                fast.copy_(slow)
                torch.testing.assert_close(average_of(optimizer), slow, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(weight, fast, rtol=1e-13, atol=1e-13)


def test_gpa_by_its_definition():
    weight = start()
    optimizer = gpa(torch.optim.SGD([weight], lr=0.1), decay=0.9, interpolation=0.7)
    generator = torch.Generator().manual_seed(3)
    z = x = y = weight.detach().clone()
    for _ in range(12):
        noise = 0.3 * torch.randn(3, generator=generator, dtype=torch.float64)
        weight.grad = CURVATURE @ (weight.detach() - OPTIMUM) + noise
        z = z - 0.1 * (CURVATURE @ (y - OPTIMUM) + noise)
        x = 0.9 * x + 0.1 * z
        y = 0.7 * x + 0.3 * z
        optimizer.step()
        torch.testing.assert_close(weight.detach(), y, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(average_of(optimizer), x, rtol=1e-12, atol=1e-13)


def test_memory_is_one_copy_where_the_average_is_recovered():
    weight = nn.Parameter(torch.ones(5))
    optimizer = PrimalAveraging(torch.optim.AdamW([weight]), EMA(decay=0.9))
    weight.grad = torch.ones(5)
    optimizer.step()
    assert {k for k, v in optimizer.state[weight].items() if getattr(v, "numel", int)() == 5} == {
        "exp_avg",
        "exp_avg_sq",
        "z",
    }


def test_bfloat16_parameters_have_float32_sequences():
    wide = nn.Parameter(torch.linspace(-1.0, 1.0, 64))
    narrow = nn.Parameter(wide.detach().to(torch.bfloat16))
    optimizers = [PrimalAveraging(torch.optim.AdamW([p], lr=1e-4), EMA(decay=0.9)) for p in (wide, narrow)]
    wide.data.copy_(narrow.data)
    for t in range(50):
        for p, optimizer in zip((wide, narrow), optimizers, strict=True):
            p.grad = torch.full((64,), 1.0 + t % 3, dtype=p.dtype)
            optimizer.step()
    assert narrow.dtype == narrow.grad.dtype == torch.bfloat16
    state = optimizers[1].state[narrow]
    assert {state[k].dtype for k in ("z", "average", "exp_avg", "exp_avg_sq")} == {torch.float32}
    torch.testing.assert_close(state["z"], optimizers[0].state[wide]["z"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(average_of(optimizers[1]), average_of(optimizers[0]), rtol=1e-5, atol=1e-6)


def test_a_failing_step_leaves_the_parameters():
    weight = start()
    optimizer = PrimalAveraging(torch.optim.AdamW([weight]), EMA(decay=0.9))
    noisy_run(optimizer, weight, 3)
    before, average = weight.detach().clone(), average_of(optimizer)
    handle = optimizer.optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()
    torch.testing.assert_close(weight.detach(), before, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(average_of(optimizer), average, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interpolation": 1.1}, "interpolation=1.1; it must be"),
        ({"interpolation": float("nan")}, "interpolation=nan"),
        ({"interpolation": lambda t: "much"}, "interpolation=nan"),
        ({"pull": -0.1}, "pull=-0.1"),
        ({"weight_decay_at_y": -1.0}, "weight_decay_at_y=-1.0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PrimalAveraging(torch.optim.SGD([start()], lr=0.1), **options)


def test_optimizers_that_cannot_be_wrapped():
    weight = start()
    with pytest.raises(TypeError, match="keeps no average"):
        PrimalAveraging(PACE([weight]))
    with pytest.raises(TypeError, match="evaluates its closure as often as it likes"):
        PrimalAveraging(torch.optim.LBFGS([weight]))
    base = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    base.step()
    with pytest.raises(ValueError, match="has stepped already"):
        PrimalAveraging(base)
    wrapped = torch.optim.SGD([start()], lr=0.1)
    PrimalAveraging(wrapped)
    with pytest.raises(ValueError, match="settings of another wrapper"):
        PrimalAveraging(wrapped)


@pytest.mark.parametrize(
    "base", [lambda p: torch.optim.AdamW(p), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)], ids=["adamw", "sgd"]
)
def test_schedule_free_warns_of_momentum(base):
    with pytest.warns(UserWarning, match="momentum"):
        schedule_free(base([start()]))


def test_schedule_free_looks_at_every_group_and_at_other_names_of_momentum():
    base = torch.optim.SGD([{"params": [start()]}, {"params": [start()], "momentum": 0.5}], lr=0.1)
    with pytest.warns(UserWarning, match="momentum 0.5"):
        schedule_free(base)
    base = torch.optim.SGD([start()], lr=0.1)
    base.param_groups[0]["beta1"] = 0.9  # as in Adafactor of transformers, whose default is None
    with pytest.warns(UserWarning, match="momentum 0.9"):
        schedule_free(base)
    base = torch.optim.SGD([start()], lr=0.1)
    base.param_groups[0] |= {"beta1": None, "betas": None}
    schedule_free(base)  # warns of nothing


@pytest.mark.parametrize(
    "name, value, scheduled",
    [
        ("interpolation", 1.5, False),
        ("interpolation", 1.5, True),
        ("interpolation", math.nan, True),
        ("pull", -1.0, False),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_changes(name, value, scheduled):
    schedule = (lambda t: 0.7 if t < 4 else value) if scheduled else 0.7
    weights = [start(), start()]
    groups = [{"params": [weight]} for weight in weights]
    optimizer = PrimalAveraging(torch.optim.SGD(groups, lr=0.1, momentum=0.5), EMA(decay=0.5), interpolation=schedule)

    def step():
        for weight in weights:
            weight.grad = weight.detach().clone()
        optimizer.step()

    for _ in range(2):
        step()
    if not scheduled:
        optimizer.param_groups[1][name] = value
    before = [weight.detach().clone() for weight in weights]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=f"PrimalAveraging: {name}={value}"):
        step()
    assert all(map(torch.equal, weights, before))
    for index, entries in optimizer.state_dict()["state"].items():
        for key, entry in entries.items():
            same = (
                torch.equal(entry, state[index][key]) if isinstance(entry, torch.Tensor) else entry == state[index][key]
            )
            assert same, key


def test_warmup_average_without_warmup_is_the_mean_of_all_but_the_start():
    from lagless import trajectory_weights

    steps = range(8)
    mean = trajectory_weights(UniformAverage(update_after=1), steps)
    assert trajectory_weights(WarmupAverage(), steps) == pytest.approx(mean, abs=1e-15)
    weights = [0.0] + [min(2 * i / 5, 1.0) ** 2 for i in range(1, 8)]
    found = trajectory_weights(WarmupAverage(warmup_steps=5, update_freq=2), range(0, 16, 2))
    assert found == pytest.approx([w / sum(weights) for w in weights], abs=1e-15)


def test_a_step_inside_autocast_is_one_outside():
    def run(inside):
        weight = nn.Parameter(torch.linspace(-1.0, 1.0, 64).view(8, 8))
        optimizer = PrimalAveraging(torch.optim.Muon([weight], lr=0.02), EMA(decay=0.9))
        for t in range(4):
            weight.grad = torch.cos(weight.detach() + t)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                optimizer.step()
        return weight.detach(), average_of(optimizer)

    for inside, outside in zip(run(True), run(False), strict=True):
        assert torch.equal(inside, outside)
