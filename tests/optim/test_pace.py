"""PACE: published vectors, limits, and what the theory says about it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lagless import BEMA, DEMA, EMA, OUEMA, Averager, PowerEMA, UniformAverage, WindowAverage
from lagless.optim import PACE
from lagless.optim._average_step import average_step, average_step_on_device, pull_decay
from lagless.rules import Tick
from lagless.testing import OPTIMIZER_CHECKS
from lagless.updates import pace_constants, pulled_adamw

START = [1.0, -0.5]
GRADIENTS = [[1.0, 0.01], [0.5, -0.02], [-0.25, 0.03], [2.0, 0.0]]


def power(kappa, **settings):
    return EMA(ema_power=kappa, lag=1.0, min_ema_multiplier=1e-4, **settings)


# An independent float64 restatement of the authors' code: θ and ema after each step, twelve digits.
VECTORS = {
    "A": (
        {"pullback": 0.3, "average": power(0.5)},
        {
            1: ((0.899000001000, -0.599499900000), (0.928582215807, -0.570357054017)),
            2: ((0.805531249431, -0.533147224565), (0.857538707246, -0.548873948966)),
            3: ((0.749539421260, -0.577855132221), (0.803539064253, -0.563364540594)),
            4: ((0.676049395849, -0.595002115618), (0.746523951257, -0.577513294273)),
        },
    ),
    "B": (
        {"pullback": 0.3, "average": power(0.5, update_freq=2)},
        {
            2: ((0.807096169540, -0.462790170547), (0.888626921556, -0.478516894949)),
            4: ((0.679244453269, -0.514343884329), (0.794988235079, -0.494539211686)),
        },
    ),
    "C": (
        {"pullback": 0.0, "average": power(0.5)},
        {4: ((0.673595433082, -0.623572026461), (0.744817985293, -0.599970091923))},
    ),
    "D": (
        {"pullback": 0.3, "average": EMA(decay=0.99)},
        {4: ((0.692028883012, -0.528543226280), (0.991689650655, -0.501237321000))},
    ),
    "E": (
        {"pullback": 1e9, "average": power(0.5), "weight_decay": 0.0},
        {4: ((0.773917964971, -0.594851875570), (0.814475280677, -0.579309619307))},
    ),
    "F": (
        {
            "pullback": 0.3,
            "average": EMA(ema_power=0.5, lag=2.0, multiplier=0.5, min_ema_multiplier=1e-4, form="pace"),
        },
        {4: ((0.673788463904, -0.617376620347), (0.698512937234, -0.609316153906))},
    ),
}


@pytest.mark.parametrize("case", VECTORS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 2e-12), (torch.float32, 3e-7)], ids=str)
@pytest.mark.parametrize("execution", [{}, {"capturable": True}], ids=str)
def test_published_vectors(case, dtype, tolerance, execution):
    settings, expected = VECTORS[case]
    weight = nn.Parameter(torch.tensor(START, dtype=dtype))
    optimizer = PACE([weight], lr=0.1, **{"weight_decay": 0.01} | settings | execution)
    for step, gradient in enumerate(GRADIENTS, start=1):
        weight.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
        if step in expected:
            for value, numbers in zip((weight, optimizer.state[weight]["average"]), expected[step], strict=True):
                torch.testing.assert_close(value.detach(), torch.tensor(numbers, dtype=dtype), rtol=0, atol=tolerance)


def test_published_gains():
    # λ of the two coordinates at every step of vector A.
    expected = [(0.0212132032, 1.0), (0.0219121907, 1.0), (0.0226859749, 0.694166341), (0.01163688, 0.717111313)]
    weight = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = PACE([weight], lr=0.1, pullback=0.3, average=power(0.5))
    for gradient, (first, second) in zip(GRADIENTS, expected, strict=True):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        with optimizer.recording() as statistics:
            optimizer.step()
        figures = statistics.read()
        assert math.isclose(figures["gain"], (first + second) / 2, rel_tol=1e-8)
        assert math.isclose(figures["gain_unclamped_min"], first, rel_tol=1e-8)
        assert figures["fraction_clipped"] == (0.5 if second == 1.0 else 0.0)


OPTIMIZERS = {
    "default": PACE,
    "capturable": lambda params: PACE(params, capturable=True),
    "gated": lambda params: PACE(params, average=EMA(update_freq=2, update_after=1), gate_pullback=True),
    "bema": lambda params: PACE(params, average=BEMA.paper(update_freq=1)),
    "dema": lambda params: PACE(params, average=DEMA.paper(update_freq=2)),
    "window": lambda params: PACE(params, average=WindowAverage(window=3)),
    "bfloat16 average": lambda params: PACE(params, average_dtype=torch.bfloat16),
    "compiled": lambda params: PACE(params, compile=True),
}


@pytest.mark.parametrize("check", OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_conformance(name, check, monkeypatch):
    monkeypatch.setattr("lagless.execution._compiled.KERNEL_SMALLEST", 2)  # the suite's tensors are small
    check(OPTIMIZERS[name])


def noisy_run(make, steps=12, seed=0, dtype=torch.float64, scale=1.0):
    """Weights after every step of a noisy quadratic."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.linspace(-1.0, 2.0, 7, dtype=dtype))
    curvature = torch.linspace(0.1, 3.0, 7, dtype=dtype)
    optimizer = make([weight])
    iterates = [weight.detach().clone()]
    for _ in range(steps):
        noise = torch.randn(7, generator=generator, dtype=torch.float64).to(dtype)
        weight.grad = scale * (curvature * weight.detach() + noise)
        optimizer.step()
        iterates.append(weight.detach().clone())
    return torch.stack(iterates), optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_without_a_pull_it_is_adamw_bit_for_bit(dtype, maximize):
    settings = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.99), "maximize": maximize}
    pace, optimizer = noisy_run(lambda p: PACE(p, pullback=0.0, **settings), dtype=dtype)
    adamw, other = noisy_run(lambda p: torch.optim.AdamW(p, **settings), dtype=dtype)
    assert torch.equal(pace, adamw)
    (mine,), (theirs,) = optimizer.state.values(), other.state.values()
    assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])


def test_the_first_pull_is_zero():
    pace, _ = noisy_run(lambda p: PACE(p, lr=0.05, pullback=1e9), steps=1)
    adamw, _ = noisy_run(lambda p: torch.optim.AdamW(p, lr=0.05), steps=1)
    assert torch.equal(pace, adamw)


def test_fully_clamped_it_is_adamw_with_a_falling_learning_rate():
    # λ = 1: θ_t = ema_{t-1} + s_t and ema_t = ema_{t-1} + β_t s_t, s_t the AdamW step from θ_{t-1}.
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = PACE([weight], lr=0.1, pullback=1e12, average=power(0.3), weight_decay=0.0)
    m = v = torch.zeros(2, dtype=torch.float64)
    average = weight.detach().clone()
    for step in range(1, 30):
        gradient = torch.sin(weight.detach() * step)
        weight.grad = gradient
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        adam = -0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), average + adam, rtol=0, atol=1e-12)
        average = average + (1 + step) ** -0.3 * adam
        torch.testing.assert_close(optimizer.read()["0"], average, rtol=0, atol=1e-12)


def test_without_the_clamp_gains_may_exceed_one():
    clamped, _ = noisy_run(lambda p: PACE(p, lr=0.05, pullback=100.0))
    free, _ = noisy_run(lambda p: PACE(p, lr=0.05, pullback=100.0, clamp=False))
    assert torch.equal(clamped[:2], free[:2]) and (clamped[2:] - free[2:]).abs().max() > 1e-2


def test_scaling_gradients_is_scaling_the_pull():
    big, _ = noisy_run(lambda p: PACE(p, lr=0.05, pullback=0.6, eps=1e-30), scale=100.0)
    small, _ = noisy_run(lambda p: PACE(p, lr=0.05, pullback=0.006, eps=1e-30))
    other, _ = noisy_run(lambda p: PACE(p, lr=0.05, pullback=0.6, eps=1e-30))
    torch.testing.assert_close(big, small, rtol=1e-11, atol=1e-11)
    assert (big - other).abs().max() > 1e-3


@pytest.mark.parametrize("pullback", [0.0, 0.5])
def test_power_one_is_the_uniform_mean_with_the_start(pullback):
    iterates, optimizer = noisy_run(lambda p: PACE(p, lr=0.05, pullback=pullback, average=power(1.0)), steps=25)
    torch.testing.assert_close(optimizer.read()["0"], iterates.mean(0), rtol=0, atol=1e-14)


RULES = [
    EMA(),
    EMA(decay=0.9),
    EMA(half_life=3.0, update_after=2),
    EMA(half_life_fraction=0.2, update_freq=2),
    EMA(ema_power=0.4, lag=3.0, multiplier=0.5, form="pace", update_after=2, update_freq=3),
    BEMA.paper(update_freq=1),
    BEMA.paper(update_freq=3, update_after=2),
    BEMA.paper(update_freq=2, update_after=2, form="trl"),
    OUEMA.paper(update_freq=2),
    DEMA.paper(update_freq=2, update_after=1),
    UniformAverage(update_freq=2, update_after=3),
    PowerEMA(update_freq=2),
    WindowAverage(window=3, update_freq=2),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_its_average_is_that_of_an_averager(rule):
    weight = nn.Parameter(torch.linspace(-1.0, 2.0, 7, dtype=torch.float64))
    optimizer = PACE([weight], lr=0.05, average=rule)
    averager = Averager({"w": weight}, rule)
    averager.attach(optimizer)
    for step in range(13):
        weight.grad = torch.cos(weight.detach() + step)
        optimizer.step()
        if averager.updates():
            torch.testing.assert_close(optimizer.read()["0"], averager.read()["w"], rtol=0, atol=1e-14)
        else:
            with pytest.raises(RuntimeError, match="has had no update"):
                optimizer.read()
    assert averager.updates()


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.update_freq == 1], ids=str)
def test_the_target_is_the_average_before_the_step(rule):
    # With an update at every step the average is what an Averager reads; through burn-in there is none and no pull.
    weight = nn.Parameter(torch.linspace(-1.0, 2.0, 7, dtype=torch.float64))
    settings = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = PACE([weight], pullback=2.0, average=rule, **settings)
    theta, m, v = weight.detach().clone(), torch.zeros(7).double(), torch.zeros(7).double()
    start, averager = theta.clone(), Averager({"w": theta}, rule)
    for step in range(1, 10):
        gradient = torch.cos(theta + step)
        weight.grad = gradient.clone()
        optimizer.step()
        following = step <= rule.update_after + 1
        target = (theta.clone() if step > 1 else start) if following else averager.read()["w"]
        decay = pull_decay(rule, Tick(step, max(step - 1, rule.update_after), step - rule.update_after))
        k = pace_constants(step, pullback=2.0 * decay, clamp=True, maximize=False, average=0.0, **settings)
        new, m, v = pulled_adamw(theta, gradient, m, v, target, k)
        theta.copy_(new)
        averager.update()
        torch.testing.assert_close(weight.detach(), theta, rtol=0, atol=1e-13)


def test_between_updates_the_target_rests_and_the_gate_closes():
    rule = power(0.5, update_freq=3)
    open_, _ = noisy_run(lambda p: PACE(p, lr=0.05, pullback=1.0, average=rule), steps=4)
    gated, _ = noisy_run(lambda p: PACE(p, lr=0.05, pullback=1.0, average=rule, gate_pullback=True), steps=4)
    adamw, _ = noisy_run(lambda p: torch.optim.AdamW(p, lr=0.05), steps=4)
    assert torch.equal(gated[:3], adamw[:3]) and not torch.equal(open_[2], adamw[2])
    assert not torch.equal(gated[3], adamw[3])
    device = {"gate_pullback": True, "capturable": True}
    on_device, _ = noisy_run(lambda p: PACE(p, lr=0.05, pullback=1.0, average=rule, **device), steps=4)
    torch.testing.assert_close(on_device, gated, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "rule, expected",
    [
        (power(0.5), 5**-0.5),
        (EMA(decay=0.9), 1.0),
        (EMA(half_life=10.0), 1.0),
        (UniformAverage(), 1 / 5),
        (BEMA.paper(ema_power=0.5, update_freq=2), 14**-0.5),
        (WindowAverage(), 1.0),
    ],
    ids=str,
)
def test_the_gain_falls_as_the_average_slows(rule, expected):
    assert math.isclose(average_step(rule, 4).decay, expected)


@pytest.mark.parametrize(
    "rule",
    [power(0.5), EMA(decay=0.9, update_freq=3, update_after=2), *RULES[3:5], UniformAverage(update_freq=2), PowerEMA()],
    ids=str,
)
def test_numbers_on_the_device_are_those_of_the_host(rule):
    steps = list(range(1, 20))
    weights, decays = average_step_on_device(rule, torch.tensor(steps, dtype=torch.float64))
    for step, weight, decay in zip(steps, weights.tolist(), decays.tolist(), strict=True):
        expected = average_step(rule, step)
        live = 0.0 if expected.update is None else expected.update.live[0]
        assert math.isclose(weight, live, rel_tol=1e-12, abs_tol=1e-15)
        assert math.isclose(decay, expected.decay, rel_tol=1e-12)


def test_groups_have_their_own_pull_and_average():
    def weights():
        return [nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2)]

    together = weights()
    rules = power(0.5), power(0.9)
    optimizer = PACE(
        [
            {"params": [together[0]], "pullback": 5.0, "average": rules[0]},
            {"params": [together[1]], "pullback": 0.5, "average": rules[1], "clamp": False},
        ],
        lr=0.1,
    )
    alone = weights()
    others = [
        PACE([alone[0]], lr=0.1, pullback=5.0, average=rules[0]),
        PACE([alone[1]], lr=0.1, pullback=0.5, average=rules[1], clamp=False),
    ]
    for step in range(6):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.tensor([1.0, -0.1]) * (step - 2.5)
            q.grad = p.grad.clone()
        for each in (optimizer, *others):
            each.step()
    for i, p in enumerate(together):
        assert torch.equal(p, alone[i])
        assert torch.equal(optimizer.read()[str(i)], others[i].read()["0"])
    assert not torch.equal(together[0], together[1])


def test_the_scheduled_learning_rate_scales_the_gain():
    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = PACE([weight], lr=0.1, pullback=0.01, average=EMA(decay=0.9))
    gains = []
    for rate in (0.1, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.full_like(weight, 2.0)
        with optimizer.recording() as statistics:
            optimizer.step()
        gains.append(statistics.read()["gain"])
    np.testing.assert_allclose(gains, [0.1 * 0.01 / 2.0, 0.05 * 0.01 / 2.0], rtol=1e-6)


def test_statistics_are_those_of_the_definition():
    weights = [nn.Parameter(torch.linspace(-1.0, 1.0, n, dtype=torch.float64)) for n in (5, 3)]
    settings = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = PACE(weights, pullback=8.0, average=EMA(decay=0.5), **settings)
    gains, squares = [], {"pull_norm": 0.0, "update_norm": 0.0, "adamw_norm": 0.0}
    with optimizer.recording() as statistics:
        with pytest.raises(RuntimeError, match="no step was recorded"):
            statistics.read()
        for step in range(1, 4):
            old = [w.detach().clone() for w in weights]
            targets = [optimizer.state[w]["average"].clone() if step > 1 else w.detach().clone() for w in weights]
            for w in weights:
                w.grad = torch.sin(3.0 * w.detach() + step)
            optimizer.step()
            for w, before, target in zip(weights, old, targets, strict=True):
                d = (optimizer.state[w]["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8
                gain = 0.1 * 8.0 / d
                gains.append(gain)
                pull, update = gain.clamp(max=1.0) * (target - before), w.detach() - before
                for name, x in (("pull_norm", pull), ("update_norm", update), ("adamw_norm", update - pull)):
                    squares[name] += x.square().sum().item()
    figures, gain = statistics.read(), torch.cat(gains)
    expected = {
        "fraction_clipped": (gain > 1).double().mean().item(),
        "gain_unclamped": gain.mean().item(),
        "gain_unclamped_max": gain.max().item(),
        "gain_unclamped_min": gain.min().item(),
        "gain": gain.clamp(max=1.0).mean().item(),
    } | {name: (square / 3) ** 0.5 for name, square in squares.items()}
    assert 0.0 < expected["fraction_clipped"] < 1.0
    assert figures.keys() == expected.keys()
    np.testing.assert_allclose([figures[k] for k in expected], list(expected.values()), rtol=1e-10)


@pytest.mark.parametrize(
    "settings, pulls",
    [
        ({"average": EMA(update_freq=2), "gate_pullback": True}, 2),
        ({"average": EMA(update_after=2)}, 2),
        ({"pullback": 0.0}, 0),
    ],
    ids=str,
)
def test_a_step_without_a_pull_counts_with_a_gain_of_zero(settings, pulls):
    weight = nn.Parameter(torch.linspace(-1.0, 1.0, 5, dtype=torch.float64))
    optimizer = PACE([weight], lr=0.1, **{"pullback": 1e9} | settings)  # every gain that there is is clamped
    squares = 0.0
    with optimizer.recording() as statistics:
        for step in range(4):
            weight.grad = torch.cos(weight.detach() + step)
            before = weight.detach().clone()
            optimizer.step()
            squares += (weight.detach() - before).square().sum().item()
    figures = statistics.read()
    assert math.isclose(figures["update_norm"], (squares / 4) ** 0.5)
    assert figures["fraction_clipped"] == figures["gain"] == pulls / 4 and figures["gain_unclamped_min"] == 0.0
    assert pulls or figures["adamw_norm"] == figures["update_norm"] > figures["pull_norm"] == 0.0


def test_a_recording_inside_another_one_ends_alone():
    weight = nn.Parameter(torch.ones(3))
    optimizer = PACE([weight], lr=0.1)
    weight.grad = torch.ones(3)
    with optimizer.recording() as outer:
        optimizer.step()
        with optimizer.recording() as inner:
            optimizer.step()
        optimizer.step()
    optimizer.step()
    assert (outer.steps, inner.steps) == (2, 1)


def test_the_gain_of_a_profile_falls_smoothly_between_updates():
    rule = EMA(half_life_fraction=0.2, update_freq=10)
    falling = [average_step(rule, step).decay for step in range(1, 50)]
    assert all(a > b > 0.0 for a, b in zip(falling, falling[1:], strict=False))
    every = EMA(half_life_fraction=0.2)
    assert falling == [average_step(every, step).decay for step in range(1, 50)]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_learning_rate_of_one_element_has_any_shape(shape, capturable):
    def run(lr):
        weights = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 3))]
        optimizer = PACE(weights, lr=lr, capturable=capturable)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return torch.cat([w.detach().reshape(-1) for w in weights])

    torch.testing.assert_close(run(torch.full(shape, 0.05)), run(0.05))


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0"),
        ({"lr": math.nan}, ValueError, "lr=nan"),
        ({"lr": torch.ones(2)}, ValueError, "lr has shape"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas=\(1\.0, 0\.9\); it must be two numbers in \[0, 1\)"),
        ({"betas": (0.9, math.nan)}, ValueError, r"betas=\(0\.9, nan\)"),
        ({"eps": 0.0}, ValueError, "PACE: eps=0.0; it must be a finite number > 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay=inf"),
        ({"pullback": -0.1}, ValueError, "pullback=-0.1"),
        ({"pullback": math.nan}, ValueError, "pullback=nan"),
        ({"pullback": True}, ValueError, "pullback=True"),
        ({"pullback": "0.1"}, ValueError, "pullback='0.1'"),
        ({"betas": 0.9}, ValueError, "betas=0.9; it must be two numbers"),
        ({"clamp": "no"}, ValueError, "clamp='no'; it must be True or False"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr=-1.0"),
        ({"average": 0.9}, TypeError, r"average.*EMA\(decay=0.9\)"),
        ({"average_dtype": torch.float16}, ValueError, "average_dtype=torch.float16"),
        ({"average": BEMA.paper(), "capturable": True}, ValueError, "capturable=True.*one buffer"),
        ({"average": EMA(half_life=5.0), "capturable": True}, ValueError, "half_life"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, error, message):
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        PACE([weight], **settings)
    with pytest.raises(error, match=message):
        PACE([{"params": [weight], **settings}])
    optimizer = PACE([weight])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **settings})


def test_sparse_and_complex_are_named():
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="real parameters and dense gradients"):
        PACE([weight]).step()


def test_a_refused_step_changes_nothing():
    first, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 2, sparse=True)
    optimizer = PACE([{"params": [first]}, {"params": table.parameters()}], lr=0.1)
    first.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3)) and not optimizer.state


def test_the_state_can_be_copied_while_evaluating():
    weight = nn.Parameter(torch.ones(2))
    optimizer = PACE([weight], lr=0.1)
    weight.grad = torch.ones(2)
    optimizer.step()
    live = weight.detach().clone()
    other, its_optimizer = copy.deepcopy((weight, optimizer.eval()))
    its_optimizer.train()
    optimizer.train()
    assert torch.equal(other, live) and torch.equal(weight, live)
