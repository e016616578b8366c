"""What a step is pulled towards, against a reference written with plain numbers.

With s the latest update before step t, A_s the average that was read there, and d_s the share of θ_s in it that is no
buffer's (BEMA has one, α_s):

    target_t = A_s + d_s (θ_{t-1} - θ_s)
"""

import math

import pytest
import torch

import lagless
from lagless import BEMA, DEMA, EMA, OUEMA, PowerEMA, UniformAverage, WindowAverage
from lagless.optim import PACE, PrimalAveraging, Pullback
from lagless.optim._average_step import pull_decay
from lagless.rules import WarmupAverage

STEPS, ETA, BETAS, EPS, DECAY, PULL = 12, 0.05, (0.9, 0.95), 1e-3, 0.1, 4.0
RULES = {
    "ema": lambda f, a: EMA(decay=0.8, update_freq=f, update_after=a),
    "ema, falling": lambda f, a: EMA(half_life_fraction=0.2, update_freq=f, update_after=a),
    "ema, paper": lambda f, a: EMA(ema_power=0.2, lag=1.0, min_ema_multiplier=1e-4, update_freq=f, update_after=a),
    "ema, half-life": lambda f, a: EMA(half_life=4.0, update_freq=f, update_after=a),
    "bema": lambda f, a: BEMA(update_freq=f, update_after=a),
    "bema, paper": lambda f, a: BEMA.paper(update_freq=f, update_after=a),
    "ouema": lambda f, a: OUEMA(update_freq=f, update_after=a),
    "dema": lambda f, a: DEMA(update_freq=f, update_after=a),
    "uniform": lambda f, a: UniformAverage(update_freq=f, update_after=a),
    "power": lambda f, a: PowerEMA(update_freq=f, update_after=a),
    "window": lambda f, a: WindowAverage(window=3, update_freq=f, update_after=a),
    "warm-up": lambda f, a: WarmupAverage(warmup_steps=4, update_freq=f, update_after=a),
}


def target(rule, path):
    """The target of step t = len(path); ``path`` has θ_0, ..., θ_{t-1}."""
    last = rule.schedule.last(len(path) - 1)
    if not last.number:
        return path[min(rule.update_after, len(path) - 1)]
    weights = lagless.trajectory_weights(rule, range(last.step + 1), at=last.step)
    average = sum(w * theta for w, theta in zip(weights, path, strict=False))
    return average + rule.read(last).live * (path[-1] - path[last.step])


def gain_of(rule, step):
    """d_t: β_t of the first EMA where it falls with time, 1 elsewhere; 0 through burn-in."""
    if step <= rule.update_after:
        return 0.0
    return pull_decay(rule, rule.schedule.tick_at(step))


def reference(rule, start, gradients, *, clamp, gate, plain=False):
    """θ_0, ..., θ_T of one coordinate."""
    path, m, v = [start], 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        theta = path[-1]
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        denominator = math.sqrt(v / (1 - BETAS[1] ** t)) + EPS
        pull = PULL * gain_of(rule, t) * (not gate or rule.schedule.updates(t))
        if plain:
            stepped, gain = theta - ETA * g, pull / 10
        else:
            stepped = (1 - ETA * DECAY) * theta - ETA * m / (1 - BETAS[0] ** t) / denominator
            gain = ETA * pull / denominator
        gain = min(gain, 1.0) if clamp else gain
        path.append(stepped + (gain * (target(rule, path) - theta) if gain else 0.0))
    return path


def run(make, start, gradients):
    weight = torch.nn.Parameter(start.clone())
    optimizer, path = make([weight]), [start.tolist()]
    for g in gradients:
        weight.grad = g.clone()
        optimizer.step()
        path.append(weight.tolist())
    return torch.tensor(path, dtype=torch.float64), optimizer


def pace(rule, **settings):
    return lambda params: PACE(
        params, lr=ETA, betas=BETAS, eps=EPS, weight_decay=DECAY, pullback=PULL, average=rule, **settings
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("freq, after", [(3, 0), (1, 4), (3, 4)])
@pytest.mark.parametrize("clamp, gate", [(True, False), (False, False), (True, True)])
def test_the_target_is_the_average_of_the_latest_update(name, freq, after, clamp, gate):
    rule = RULES[name](freq, after)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, dtype=torch.float64, generator=generator)
    gradients = torch.randn(STEPS, 3, dtype=torch.float64, generator=generator)
    settings = {"clamp": clamp, "gate_pullback": gate}
    coordinates = list(zip(start.tolist(), gradients.mT.tolist(), strict=True))
    paths = [reference(rule, x, g, clamp=clamp, gate=gate) for x, g in coordinates]
    expected = torch.tensor(paths, dtype=torch.float64).mT
    makers = [pace(rule, **settings), pace(rule, compile=True, **settings)]
    if len(rule.buffer_keys) == 1 and name != "ema, half-life":
        makers.append(pace(rule, capturable=True, **settings))
    base = {"lr": ETA, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    makers.append(lambda params: Pullback(torch.optim.AdamW(params, **base), PULL, rule, **settings))
    for make in makers:
        found, optimizer = run(make, start, gradients)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        if rule.schedule.last(STEPS).number:
            weights = lagless.trajectory_weights(rule, range(STEPS + 1), at=STEPS)
            torch.testing.assert_close(optimizer.read()["0"], torch.as_tensor(weights) @ expected, rtol=1e-9, atol=1e-9)
    paths = [reference(rule, x, g, clamp=clamp, gate=gate, plain=True) for x, g in coordinates]
    found, _ = run(
        lambda params: Pullback(torch.optim.SGD(params, lr=ETA), PULL / 10, rule, gain="constant", **settings),
        start,
        gradients,
    )
    torch.testing.assert_close(found, torch.tensor(paths, dtype=torch.float64).mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_between_updates_the_target_is_neither_frozen_nor_read_ahead(name):
    """BEMA's correction follows the iterate; all others rest until the next update, while read() counts it in."""
    rule = RULES[name](3, 0)
    path = [0.0, 1.0, 3.0, 2.0, 5.0]
    last = rule.schedule.last(4)
    assert last.step == 3
    frozen = target(rule, path[:4])
    moves = rule.read(last).live * (path[4] - path[3])
    assert target(rule, path) == pytest.approx(frozen + moves)
    assert (moves != 0.0) == name.startswith("bema")
    ahead = lagless.trajectory_weights(rule, range(5), at=4) @ path
    assert ahead != pytest.approx(target(rule, path))


@pytest.mark.parametrize("freq", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_primal_averaging_interpolates_towards_the_same_target(name, freq):
    rule, start = RULES[name](freq, 0), 1.0
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(STEPS, 1, dtype=torch.float64, generator=generator)
    z, expected = [start], []
    for t, g in enumerate(gradients[:, 0].tolist(), 1):
        z.append(z[-1] - ETA * g)
        x = target(rule, z) if rule.schedule.last(t).number else z[0]
        expected.append(0.3 * z[-1] + 0.7 * x)
    found, _ = run(
        lambda params: PrimalAveraging(torch.optim.SGD(params, lr=ETA), rule, interpolation=0.7),
        torch.tensor([start], dtype=torch.float64),
        gradients,
    )
    torch.testing.assert_close(found[1:, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
