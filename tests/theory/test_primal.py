"""Gradients at the interpolation, on quadratics: exact moments, what they cost and gain, and where they diverge."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from lagless import BEMA, EMA, OUEMA, UniformAverage, WindowAverage
from lagless.optim import PrimalAveraging
from lagless.theory import (
    PrimalRecursion,
    PullRecursion,
    best_primal_averaging,
    largest_stable_rate,
    plain_twin,
    primal_moments,
)
from lagless.theory.primal._best import _risks

LARGEST_Z = 4.5  # two-sided probability 7e-6 a number
shares = st.floats(0.0, 1.0)
gains = st.floats(1e-3, 1.0)


def simulate(recursion, steps, paths, seed):
    """z and x of independent paths after so many steps, by the method's own equations."""
    r, rng = recursion, np.random.default_rng(seed)
    z = x = v = np.zeros(paths)
    for _ in range(steps):
        y = (1.0 - r.m) * z + r.m * x
        v = r.momentum * v + r.a * y + r.sigma * rng.standard_normal(paths)
        z = z - v
        x = (1.0 - r.b) * x + r.b * z
        z = z + r.p * (x - z)
    return z, x


@given(st.floats(1e-3, 4.0), gains, shares)
def test_the_closed_form_solves_the_covariance_equation(a, b, m):
    recursion = PrimalRecursion(a, b, m, sigma=0.3)
    assume(recursion.contraction < 0.9999)
    assert recursion.average_variance == pytest.approx(float(recursion.covariance[1, 1]), rel=1e-6)
    (l1, l2), product = recursion.roots, recursion.a * recursion.b
    assert ((1.0 - l1) * (1.0 - l2)).real == pytest.approx(product, rel=1e-6)
    u1, u2 = ((1.0 - each) / (1.0 + each) for each in (l1, l2))
    assume(abs(1.0 + l1) > 1e-6 and abs(1.0 + l2) > 1e-6)
    by_roots = (0.3 / a) ** 2 * (u1 * u2 * (1.0 + u1 * u2) / (u1 + u2)).real
    assert recursion.average_variance == pytest.approx(by_roots, rel=1e-5)


@given(st.floats(1e-3, 1.9), st.floats(1e-3, 0.99))
def test_without_interpolation_it_is_sgd_beside_its_average(a, b):
    plain, known = PrimalRecursion(a, b), PullRecursion(a, b)
    assert plain.average_variance == pytest.approx(known.ema_variance, rel=1e-9)
    assert plain.covariance[0, 0] == pytest.approx(known.live_variance, rel=1e-6)
    assert plain.contraction == pytest.approx(known.contraction, abs=1e-7)  # half the digits of a double root


@pytest.mark.parametrize(
    "recursion",
    [
        PrimalRecursion(0.3, 0.1, 0.9),
        PrimalRecursion(0.3, 0.05, 1.0),
        PrimalRecursion(3.0, 0.2, 0.8, sigma=2.0),
        PrimalRecursion(0.3, 0.1, 0.5, p=0.4),
        PrimalRecursion(0.3, 0.1, 0.0, p=1.0),
        PrimalRecursion(0.1, 0.1, 0.4, momentum=0.7),
        PrimalRecursion(0.1, 0.2, 0.7, p=0.1, momentum=0.5),
    ],
    ids=repr,
)
def test_stationary_moments_by_simulation(recursion):
    paths = 20_000
    z, x = simulate(recursion, 300, paths, seed=1)
    assert recursion.contraction**600 < 1e-4  # the start is forgotten
    c = recursion.covariance
    pairs = {"zz": (z * z, c[0, 0]), "zx": (z * x, c[0, 1]), "xx": (x * x, recursion.average_variance)}
    for name, (samples, wanted) in pairs.items():
        score = (samples.mean() - wanted) / (samples.std() / math.sqrt(paths))
        assert abs(score) < LARGEST_Z, (name, score)


def test_full_interpolation_is_momentum():
    """m = 1: x is the iterate of SGD with momentum 1 - b and learning rate b·η, on any loss."""
    x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    w = x.detach().clone().requires_grad_(True)
    b, lr = 0.2, 0.3
    primal = PrimalAveraging(torch.optim.SGD([x], lr=lr), EMA(decay=1.0 - b), interpolation=1.0)
    momentum = torch.optim.SGD([w], lr=b * lr, momentum=1.0 - b)
    for _ in range(30):
        for weight, optimizer in ((x, primal), (w, momentum)):
            optimizer.zero_grad()
            weight.cosh().log().sum().backward()
            optimizer.step()
        torch.testing.assert_close(x, w, rtol=1e-12, atol=1e-12)


@given(st.floats(1e-3, 1.5), st.floats(1e-3, 0.9), shares)
def test_on_one_curvature_it_is_another_plain_average(a, b, m):
    recursion = PrimalRecursion(a, b, m)
    slow, fast = recursion.roots
    assume(slow.imag == 0.0 and fast.real > 1e-3 and slow.real < 1.0 - 1e-6 and slow.real - fast.real > 1e-4)
    twin = plain_twin(recursion)
    assert twin.average_variance == pytest.approx(recursion.average_variance, rel=1e-6)
    assert twin.contraction == pytest.approx(recursion.contraction, abs=1e-9)
    for seed in (0, 1):  # the same process, for the same noise
        _, x = simulate(recursion, 40, 3, seed)
        _, other = simulate(twin, 40, 3, seed)
        np.testing.assert_allclose(other, x, rtol=1e-6, atol=1e-9)


@settings(max_examples=300)
@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(-3.0, 1.0), st.floats(-4.0, 0.0), st.floats(0.0, 5.0))
def test_no_interpolation_beats_a_plain_average_of_the_same_contraction(where, inner, lr, gain, rest):
    """Of any two curvatures 1 and κ: what contracts by r has in both at least the variance of η = r, b = r, m = 0."""
    kappa = 10.0 ** (2.0 * where)
    h = [1.0, 1.0 + inner * (kappa - 1.0), kappa]
    eta, b, m = 10.0**lr, 10.0**gain, 1.0 - 10.0**-rest
    family = [PrimalRecursion(eta * each, b, m, sigma=eta) for each in h]
    rate = 1.0 - max(each.contraction for each in family)
    assume(1e-6 < rate <= 2.0 / (kappa + 1.0))  # the fastest contraction of SGD, and so of its averages
    for each, one in zip(h, family, strict=True):
        plain = PrimalRecursion(rate * each, rate, sigma=rate)
        assert plain.contraction <= 1.0 - rate + 1e-7
        assert one.average_variance >= plain.average_variance * (1.0 - 1e-6)


@pytest.mark.parametrize("a, rate", [(0.1, 0.01), (0.1, 0.001), (0.01, 0.0001)])
def test_at_the_same_learning_rate_interpolation_can_halve_the_variance(a, rate):
    """(a + r)/(2a) of the plain average's: a double root, where b = r²/a."""
    b = rate * rate / a
    primal = PrimalRecursion(a, b, (a + b - 2.0 * rate) / (a * (1.0 - b)))
    plain = PrimalRecursion(a, rate)
    assert primal.contraction == pytest.approx(plain.contraction, abs=1e-6 * rate + 2e-8)
    assert primal.average_variance / plain.average_variance == pytest.approx((a + rate) / (2.0 * a), rel=1e-2)
    slower = PrimalRecursion(rate, rate, sigma=rate / a)  # so does a smaller learning rate, without interpolation
    assert slower.average_variance == pytest.approx(primal.average_variance, rel=1e-6)


def test_interpolation_contracts_faster_than_any_plain_average():
    """κ = 100: plain averages contract by 2/(κ + 1) at best, interpolation by about 2/√κ, at a finite variance."""
    primal = [PrimalRecursion(0.1 * h, 0.3306, 1.0) for h in (1.0, 10.0, 100.0)]
    rate = 1.0 - max(each.contraction for each in primal)
    assert rate > 8.0 * 2.0 / 101.0
    assert all(math.isfinite(each.average_variance) for each in primal)


@given(gains, shares, st.floats(0.0, 0.99))
def test_the_edge_of_stability(b, m, momentum):
    edge = largest_stable_rate(b, m, momentum)
    assert edge > 0.0
    if edge < 1e6:
        below, above = (PrimalRecursion(edge * (1.0 + d), b, m, momentum=momentum) for d in (-1e-3, 1e-3))
        assert below.contraction < 1.0 + 1e-12 <= above.contraction + 1e-9
        assert PrimalRecursion(0.5 * edge, b, m, momentum=momentum).is_stable


def test_momentum_and_an_average_as_short_as_it_diverge_together():
    """Each alone is stable; b = 1 - μ = 0.1 and m = 0.9 together are not, on a parabola, with the optimizer itself."""
    runs = {"momentum": (0.9, 0.0), "interpolation": (0.0, 0.9), "both": (0.9, 0.9), "both, m = 1/2": (0.9, 0.5)}
    a, ends = 0.2, {}
    for name, (momentum, m) in runs.items():
        weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
        base = torch.optim.SGD([weight], lr=a, momentum=momentum)
        optimizer = PrimalAveraging(base, EMA(decay=0.9), interpolation=m)
        for _ in range(300):
            optimizer.zero_grad()
            (0.5 * weight.square()).sum().backward()
            optimizer.step()
        ends[name] = abs(float(weight.detach()))
        assert (a < largest_stable_rate(0.1, m, momentum)) == (name != "both")
    assert ends.pop("both") > 1e6
    assert max(ends.values()) < 0.1
    near = 0.1 * 0.1 * 0.2 / (0.1 - 0.1 * 0.2)  # the approximation of the docstring
    assert largest_stable_rate(0.1, 0.9, 0.9) == pytest.approx(near, rel=0.25)
    assert largest_stable_rate(0.001, 0.9, 0.999) == pytest.approx(
        0.001 * 0.001 * 0.002 / (0.001 - 0.1 * 0.002), rel=1e-2
    )


RULES = {
    "ema": (EMA(decay=0.9), {}),
    "uniform": (UniformAverage(), {}),
    "power, off update steps": (EMA(update_freq=3, update_after=4), {"pull": 0.3}),
    "several buffers": (BEMA.paper(update_freq=2), {}),
    "ou": (OUEMA.paper(update_freq=1), {"interpolation": lambda t: min(1.0, t / 30)}),
    "window": (WindowAverage(window=3, update_freq=2), {"interpolation": 0.0}),
    "lookahead": (EMA(decay=0.5, update_freq=5), {"interpolation": 0.0, "pull": 1.0}),
}


@pytest.mark.parametrize("name", RULES)
def test_moments_of_any_rule_are_those_of_the_optimizer(name):
    rule, options = RULES[name]
    options = {"interpolation": 0.7} | options
    h, steps, paths = torch.tensor([0.2, 1.0], dtype=torch.float64), 41, 4000
    generator = torch.Generator().manual_seed(2)
    for noise in (0.0, 1.5):
        rows = paths if noise else 1
        weight = torch.nn.Parameter(torch.tensor([[2.0, -1.0]], dtype=torch.float64).repeat(rows, 1))
        optimizer = PrimalAveraging(torch.optim.SGD([weight], lr=0.3), rule, **options)
        for _ in range(steps):
            weight.grad = h * weight.detach() + noise * torch.randn(rows, 2, generator=generator, dtype=torch.float64)
            optimizer.step()
        x = optimizer.read()["0"].numpy()
        found = primal_moments(rule, h, noise, steps, lr=0.3, distance=[2.0, -1.0], **options)
        if not noise:
            np.testing.assert_allclose(found.mean, x[0], rtol=1e-10, atol=1e-12)
            assert not found.variance.any()
            continue
        score = (x.mean(0) - found.mean) / (x.std(0) / math.sqrt(paths))
        squares = (x - found.mean) ** 2
        score = [*score, *((squares.mean(0) - found.variance) / (squares.std(0) / math.sqrt(paths)))]
        assert np.abs(score).max() < LARGEST_Z, score


def test_moments_become_stationary():
    found = primal_moments(EMA(decay=0.95), [0.4, 1.0], 2.0, 800, lr=0.5, interpolation=0.8)
    for i, a in enumerate((0.2, 0.5)):
        recursion = PrimalRecursion(a, 0.05, 0.8, sigma=1.0)
        assert found.variance[i] == pytest.approx(recursion.average_variance, rel=1e-6)
        assert found.live_variance[i] == pytest.approx(recursion.covariance[0, 0], rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_powers_of_a_block_are_the_recursion_step_by_step(steps):
    settings = np.array([[0.3, 0.1, 0.2], [0.01, 1.0, 1.0], [1.2, 0.05, 0.9]])
    h, noise, start = np.array([0.1, 1.0]), np.array([0.5, 2.0]), np.array([1.0, -3.0])
    found = _risks(settings, h, noise, start, steps)
    for risk, (lr, b, rest) in zip(found, settings, strict=True):
        one = primal_moments(EMA(decay=1.0 - b), h, noise, steps, lr=lr, interpolation=1.0 - rest, distance=start)
        assert risk == pytest.approx(0.5 * float(h @ (one.mean**2 + one.variance)), rel=1e-10)


def test_the_best_setting_is_what_it_says_and_none_near_it_is_better():
    h, noise, steps = np.geomspace(1e-2, 1.0, 5), 1.0, 300
    best = best_primal_averaging(h, noise, steps)
    for lr, rule, m, risk in (
        (best.lr, best.rule, best.interpolation, best.risk),
        (best.plain_lr, best.plain_rule, 0.0, best.plain_risk),
    ):
        one = primal_moments(rule, h, noise, steps, lr=lr, interpolation=m)
        assert risk == pytest.approx(0.5 * float(h @ (one.mean**2 + one.variance)), rel=1e-9)
    b, rest = 1.0 - best.rule.decay, 1.0 - best.interpolation
    near = np.array([[best.lr * x, min(1.0, b * y), min(1.0, rest * z)] for x, y, z in np.exp(0.3 * _directions())])
    ones = np.ones(len(h))
    assert best.risk <= _risks(near, h, noise * ones, ones, steps).min() * (1.0 + 1e-3)
    assert 1.0 <= best.improvement < 1.1  # over a spread of curvatures there is little to gain


def _directions():
    return np.array([[x, y, z] for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)], dtype=float)


def test_bad_input():
    for arguments, message in (
        ({"a": 0.0, "b": 0.1}, "a=0"),
        ({"a": 1.0, "b": 1.5}, "b=1.5"),
        ({"a": 1.0, "b": 0.1, "m": 1.1}, "m=1.1"),
        ({"a": 1.0, "b": 0.1, "momentum": 1.0}, "momentum=1"),
        ({"a": math.nan, "b": 0.1}, "a=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            PrimalRecursion(**arguments)
    with pytest.raises(ValueError, match="no stationary law: its largest root"):
        _ = PrimalRecursion(3.0, 0.1).average_variance
    with pytest.raises(ValueError, match="a plain twin needs real ones"):
        plain_twin(PrimalRecursion(0.1, 0.1, 1.0))
    with pytest.raises(ValueError, match="without both"):
        plain_twin(PrimalRecursion(0.1, 0.1, p=0.5))
    with pytest.raises(ValueError, match="m=2"):
        largest_stable_rate(0.1, 2)
    good = {"rule": EMA(decay=0.9), "curvatures": [1.0], "noise": 1.0, "steps": 3, "lr": 0.1}
    for change, message in (
        ({"curvatures": [0.0]}, "curvatures"),
        ({"curvatures": []}, "curvatures"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"distance": [1.0, 2.0]}, "distance"),
        ({"steps": 0}, "steps=0"),
        ({"lr": math.inf}, "lr=inf"),
        ({"interpolation": 1.5}, "interpolation=1.5"),
        ({"pull": -0.1}, "pull=-0.1"),
        ({"rule": EMA(decay=0.9, update_freq=5)}, "has had no update by then"),
    ):
        with pytest.raises(ValueError, match=message):
            primal_moments(**{**good, **change})
    with pytest.raises(ValueError, match="steps=0"):
        best_primal_averaging([1.0], 1.0, 0)
