"""Microbatches that make up unequal parts of a step's gradient."""

import itertools
import math

import pytest
import torch

from lagless.optim import BiasCorrectedAdamW, BiasCorrectedShampoo, BiasCorrectedSophia
from lagless.optim.bias_corrected._sums import Power
from lagless.updates import AdamForm, EmaWeights, Group, Moments, adam_folds

FORMS = [
    {"cross_fit": "none", "inverse_correction": "post_ema"},
    {"cross_fit": "none", "inverse_correction": "pre_ema", "folds": "exact"},
    {"cross_fit": "split", "inverse_correction": "pre_ema"},
    {"cross_fit": "split", "folds": "exact"},
    {"cross_fit": "symmetric", "inverse_correction": "post_ema"},
    {"cross_fit": "leave_one_out", "inverse_correction": "jackknife"},
    {"cross_fit": "leave_one_out", "folds": "skewed"},
    {"cross_fit": "leave_one_out", "inverse_correction": "jackknife", "folds": "exact"},
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))


def make(p, **settings):
    return BiasCorrectedAdamW(
        [("w", p)], **{"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1, "warm_start": 0, "report_freq": 0} | settings
    )


def arrive(optimizer, p, means, weights, announce=True, scale=1.0):
    """One backward() per microbatch, with the gradient weight · mean."""
    for mean, weight in zip(means, weights, strict=True):
        if announce:
            optimizer.set_microbatch_weight(weight)
        (scale * float(weight) * (p * mean).sum()).backward()


def trained(form, weights, announce=True, scale=1.0, clip=None, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    p = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    optimizer = make(p, **form, **settings)
    for _ in range(3):
        means = torch.randn(len(weights), 3, 5, generator=generator, dtype=torch.float64) + 0.3
        arrive(optimizer, p, means, weights, announce, scale)
        if clip:
            torch.nn.utils.clip_grad_norm_([p], clip)
        optimizer.step()
        optimizer.zero_grad()
    return p.detach()


@forms
def test_equal_weights_are_no_weights(form):
    plain = trained(form, [1.0] * 4, announce=False)
    torch.testing.assert_close(trained(form, [1.0] * 4), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trained(form, [7.0] * 4, scale=1 / 7), plain, rtol=1e-9, atol=1e-9)


@forms
def test_only_ratios_of_weights_count(form):
    """Also for losses divided by all weights or not, and for gradients clipped by their norm."""
    weights = [5.0, 1.0, 2.0, 4.0]
    expected = trained(form, weights, clip=0.5)
    # Its third moment is a difference of nearly equal numbers.
    close = 1e-5 if form.get("folds") == "skewed" else 1e-8
    scaled = [w / 12.0 for w in weights]
    torch.testing.assert_close(trained(form, scaled, clip=0.5), expected, rtol=close, atol=close)
    torch.testing.assert_close(trained(form, weights, scale=3.0, clip=0.5), expected, rtol=close, atol=close)
    assert not torch.allclose(trained(form, weights, announce=False, clip=0.5), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS[1:2] + FORMS[3:4] + FORMS[-1:], ids=lambda form: form["cross_fit"])
def test_kept_gradients_are_those_of_the_formula(form):
    """Leave-one-out: Σ w_r m̂_r/D_r, D_r from (ḡ - w_r g_r)/(1 - w_r), written out; the others by their groups."""
    weights = torch.tensor([5.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(4, 6, generator=generator, dtype=torch.float64) + 0.3
    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = make(p, **form | {"inverse_correction": "none"}, lr=1.0, weight_decay=0.0)
    arrive(optimizer, p, g, weights, scale=1.0 / 12.0)
    optimizer.step()
    zero = Moments(torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    if form["cross_fit"] == "leave_one_out":
        shares = (weights / weights.sum())[:, None]
        others = ((shares * g).sum(0) - shares * g) / (1 - shares)
        expected = (shares * g / (others.abs() + 1e-3)).sum(0)
    else:
        parts = [slice(None)] if form["cross_fit"] == "none" else [slice(0, None, 2), slice(1, None, 2)]
        groups = [Group.of(g[part], weights[part]) for part in parts]
        expected = adam_folds(AdamForm(form["cross_fit"]), groups, zero, EmaWeights.at((0.9, 0.95), 1), 1e-3).update
    torch.testing.assert_close(-p.detach(), expected, rtol=1e-9, atol=1e-9)


def every_outcome(sizes, values=(-1.0, 2.0), chances=(0.75, 0.25)):
    """Mean gradients of microbatches for every outcome of their tokens, shape (microbatches, outcomes), and chances."""
    tokens = torch.tensor(list(itertools.product(range(2), repeat=sum(sizes))))
    chance = torch.tensor(chances, dtype=torch.float64)[tokens].prod(dim=1)
    parts = torch.tensor(values, dtype=torch.float64)[tokens].T.split(sizes)
    return torch.stack([part.mean(dim=0) for part in parts]), chance


@pytest.mark.parametrize("sizes", [(3, 3, 3), (6, 2, 1), (4, 3, 1, 1)], ids=str)
def test_moments_of_few_tokens_are_unbiased(sizes):
    """Every coordinate is an outcome. Over all of them Σ w_j(g_j - ḡ)²/(n - 1) is Var(ḡ) = σ²/T on average, and the
    third central moment that of n equal microbatches, (n - 1)(n - 2)κ₃/T².
    """
    n, total = len(sizes), sum(sizes)
    means, chance = every_outcome(sizes)
    p = torch.zeros(means.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = make(p, folds="skewed")
    arrive(optimizer, p, means, [float(s) for s in sizes], scale=1.0 / total)
    found = optimizer._microbatches.read([p])[p]
    mean, square, cube = p.grad, found.mean(Power(2)), found.mean(Power(3))
    assert mean is not None
    second = square - mean**2
    third = (cube - 3 * mean * square + 2 * mean**3) * found.weights.third
    variance = 9.0 * 0.75 * 0.25
    skew = 27.0 * 0.75 * 0.25 * (0.75 - 0.25)  # κ₃ of 3·Bernoulli(1/4)
    assert math.isclose(float(chance @ second) / (n - 1), variance / total, rel_tol=1e-12)
    assert math.isclose(float(chance @ third), (n - 1) * (n - 2) * skew / total**2, rel_tol=1e-11)
    # Taken for equal, neither is.
    uneven = float(chance @ (n * (means * torch.tensor(sizes)[:, None] / total).square().sum(0) - mean**2))
    assert math.isclose(uneven / (n - 1), variance / total, rel_tol=1e-12) == (len(set(sizes)) == 1)


def one_step_bias(tokens, announce, draws=400_000, **form):
    """Bias of a step relative to the population's, and its standard error.

    Tokens of deviation 1 around 0.5, β = (0, 0.95), v settled.
    """
    total, mu, beta2 = sum(tokens), 0.5, 0.95
    population = mu**2 + 1.0 / total
    generator = torch.Generator().manual_seed(2)
    p = torch.zeros(draws, dtype=torch.float64, requires_grad=True)
    optimizer = make(p, betas=(0.0, beta2), lr=1.0, eps=0.0, weight_decay=0.0, **form)
    state = {"step": torch.tensor(10_000.0), "exp_avg": torch.zeros_like(p.detach())}
    optimizer.state[p] |= state | {"exp_avg_sq": torch.full_like(p.detach(), population)}
    noise = torch.randn(len(tokens), draws, generator=generator, dtype=torch.float64)
    means = mu + noise / torch.tensor(tokens, dtype=torch.float64).sqrt()[:, None]
    arrive(optimizer, p, means, [float(t) for t in tokens], announce, scale=1.0 / total)
    optimizer.step()
    relative = -p.detach() * math.sqrt(population) / mu - 1.0
    return float(relative.mean()), float(relative.std()) / math.sqrt(draws)


def test_leaving_one_out_removes_the_bias_of_unequal_microbatches():
    """By Monte Carlo, z-bound 4.

    For normal gradients (ḡ, Σ w_j(g_j - ḡ)²) has the same law whatever the shares, and so has the two-node step: its
    bias is that of equal microbatches. Taken for equal, unequal ones are over-corrected.
    """
    plain, _ = one_step_bias((13, 1, 1, 1), False, cross_fit="none")
    equal, error = one_step_bias((4, 4, 4, 4), False)
    weighed, other = one_step_bias((13, 1, 1, 1), True)
    over, third = one_step_bias((13, 1, 1, 1), False)
    assert abs(weighed - equal) < 4 * math.hypot(error, other)
    assert abs(weighed) < 0.25 * abs(plain)
    assert over > 0.02 and over > weighed + 4 * math.hypot(other, third)


@pytest.mark.parametrize("folds", ["moments", "exact", "skewed"])
def test_a_microbatch_of_weight_zero_is_not_counted(folds):
    form = {"cross_fit": "leave_one_out", "folds": folds, "inverse_correction": "jackknife"}
    found = trained_on([5.0, 0.0, 2.0, 4.0], form)
    torch.testing.assert_close(found, trained_on([5.0, 2.0, 4.0], form), rtol=1e-9, atol=1e-9)


def trained_on(weights, form):
    """Each microbatch's gradient is a function of its weight."""
    p = torch.ones(4, dtype=torch.float64, requires_grad=True)
    optimizer = make(p, **form)
    for step in range(3):
        means = [torch.cos(torch.arange(4, dtype=torch.float64) * (1.0 + w) + step) + 0.5 for w in weights]
        arrive(optimizer, p, means, weights)
        optimizer.step()
        optimizer.zero_grad()
    return p.detach()


def test_refusals():
    p = torch.ones(4, requires_grad=True)
    optimizer = make(p)
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"weight={weight}; it must be a finite number >= 0"):
            optimizer.set_microbatch_weight(weight)
    optimizer.set_microbatch_weight(2.0)
    for _ in range(3):
        p.square().sum().backward()
    with pytest.raises(RuntimeError, match="1 of 3 microbatches of this step were given a weight"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4)) and not optimizer.state


def test_a_compiled_step_takes_weights():
    weights = [5.0, 1.0, 2.0, 4.0]
    for form in ({"folds": "skewed"}, {"cross_fit": "split", "inverse_correction": "pre_ema"}):
        found = []
        for compile in (False, True):
            generator = torch.Generator().manual_seed(3)
            p = torch.ones(1 << 17, dtype=torch.float64, requires_grad=True)
            optimizer = make(p, **form, compile=compile)
            for step in range(2):
                means = torch.randn(4, p.numel(), generator=generator, dtype=torch.float64) + 0.3
                arrive(optimizer, p, means, weights[step:] + weights[:step])
                optimizer.step()
                optimizer.zero_grad()
            found.append(p.detach())
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_shampoo():
    """M from Σ w G over the first half, the left factor from Σ w G Gᵀ over the second, written out."""
    weights, generator = torch.tensor([5.0, 1.0, 2.0, 4.0], dtype=torch.float64), torch.Generator().manual_seed(4)
    g = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    p = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    optimizer = BiasCorrectedShampoo([("w", p)], inverse_correction="post_ema", damping=1e-2, grafting="none")
    arrive(optimizer, p, g, weights, scale=1.0 / 12.0)
    optimizer.step()
    state = optimizer.state[p]
    first = (weights[0::2, None, None] * g[0::2]).sum(0) / weights[0::2].sum()
    second = sum(w * x @ x.T for w, x in zip(weights[1::2], g[1::2], strict=True)) / weights[1::2].sum()
    torch.testing.assert_close(state["exp_avg"], 0.1 * first, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state["left_factor_0"], 0.05 * second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cross_fit", ["none", "split"])
def test_sophia(cross_fit):
    """h from (Σ w q)², or from Σ w q² over the second half."""
    weights, generator = torch.tensor([5.0, 1.0, 2.0, 4.0], dtype=torch.float64), torch.Generator().manual_seed(5)
    g, q = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = BiasCorrectedSophia([("w", p)], cross_fit=cross_fit, hessian_freq=1)
    for j, weight in enumerate(weights):
        optimizer.set_microbatch_weight(float(weight))
        optimizer.add_curvature((p * q[j]).sum())
        (weight / 12.0 * (p * g[j]).sum()).backward()
    optimizer.step()
    expected = (weights @ q / 12.0).square() if cross_fit == "none" else weights[1::2] @ q[1::2] ** 2 / 5.0
    torch.testing.assert_close(optimizer.state[p]["hessian"], 0.01 * expected, rtol=1e-9, atol=1e-9)
