"""The gradient noise scale: against per-example gradients, unbiased, of a step's microbatches and no others."""

import contextlib
import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import lagless
from lagless.optim import (
    BiasCorrectedAdamW,
    BiasCorrectedShampoo,
    BiasCorrectedSophia,
    GradientNoise,
    NoiseEstimate,
    PrimalAveraging,
)
from lagless.optim.bias_corrected._gradients import squared_norm
from lagless.updates import noise_moments

EVERY_SQUARE = {  # sums over all microbatches: the usual estimate
    "leave one out": {},
    "skewed": {"folds": "skewed"},
    "exact": {"folds": "exact"},
    "inverse": {"cross_fit": "none", "inverse_correction": "post_ema"},
    "symmetric": {"cross_fit": "symmetric"},
}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def adamw(model, **form):
    return BiasCorrectedAdamW(model.named_parameters(), lr=1e-3, warm_start=0, exclude=(), **form)


def examples(count, seed=1):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_example(model, x):
    """Autograd's gradient of every example, shape (examples, parameters); and the number of each parameter's."""
    weights = dict(model.named_parameters())

    def loss(values, row):
        return functional_call(model, values, row[None]).square().mean()

    gradients = vmap(grad(loss), in_dims=(None, 0))({k: v.detach() for k, v in weights.items()}, x)
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def expected(gradients, weights, samples):
    """|G|² and tr Σ of one sample, of microbatch gradients of these weights in a step of so many samples."""
    n, w = len(gradients), torch.tensor(weights, dtype=torch.float64)
    mean = (w[:, None] * gradients).sum(dim=0) / w.sum()
    step = float((w * (gradients - mean).square().sum(dim=1)).sum() / w.sum() / (n - 1))
    return NoiseEstimate(float(mean @ mean) - step, step * samples)


def close(found, wanted, tolerance=1e-9):
    assert found.signal == pytest.approx(wanted.signal, rel=tolerance)
    assert found.noise == pytest.approx(wanted.noise, rel=tolerance)


@pytest.mark.parametrize("size, count", [(1, 6), (4, 3)])
def test_per_example_gradients_are_the_oracle(size, count):
    model, x = make_model(), examples(size * count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = GradientNoise(model, samples_per_microbatch=size)
    noise.attach(optimizer)
    means = per_example(model, x).view(count, size, -1).mean(dim=1)
    for batch in x.view(count, size, 3):
        (model(batch).square().mean() / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # norms before clipping count
    optimizer.step()
    found = noise.noise_scale()
    wanted = expected(means, [1.0] * count, size * count)
    close(found.latest, wanted)
    close(found.smoothed, wanted)  # of one step it is that step
    assert found.latest.scale == pytest.approx(wanted.noise / wanted.signal)
    assert (found.steps, found.samples, found.group) == (1, size * count, None)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (5.0, 1.0, 2.0, 4.0), (3.0, 0.0, 1.0, 2.0)])
@pytest.mark.parametrize("form", ["beside", *EVERY_SQUARE])
def test_unequal_microbatches_and_groups(form, weights):
    """Microbatches of w examples, whose losses are sums over the examples of the step, as in language models."""
    model, total = make_model(), sum(weights)
    parts = torch.split(examples(int(total)), [int(w) for w in weights])
    if form == "beside":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        source = GradientNoise([{"params": model[0].parameters()}, {"params": list(model[2].named_parameters())}])
        source.attach(optimizer)
    else:
        groups = [{"params": list(model[i].named_parameters())} for i in (0, 2)]
        source = optimizer = BiasCorrectedAdamW(groups, lr=1e-3, warm_start=0, exclude=(), **EVERY_SQUARE[form])
    gradients = torch.stack([per_example(model, x).mean(dim=0) for x in parts if len(x)])
    for w, x in zip(weights, parts, strict=True):
        source.set_microbatch_weight(w)
        (model(x).square().sum() / total).backward()
    optimizer.step()
    found, positive = source.noise_scale(), [w for w in weights if w]
    close(found.latest, expected(gradients, positive, total))
    cut = sum(p.numel() for p in model[0].parameters())
    for group, part in zip(found.groups, (gradients[:, :cut], gradients[:, cut:]), strict=True):
        close(group.latest, expected(part, positive, total))
    assert [group.group for group in found.groups] == [0, 1]
    assert found.samples == total


def test_samples_per_microbatch_are_the_unit_where_weights_are_tokens():
    model, weights = make_model(), (2.0, 6.0)
    found = []
    for size in (None, 8.0):
        noise = GradientNoise(model, samples_per_microbatch=size)
        for w, x in zip(weights, examples(2).unbind(), strict=True):
            noise.set_microbatch_weight(w)
            (w * model(x).square().mean()).backward()
        noise.update()
        model.zero_grad()
        found.append(noise.noise_scale())
    assert (found[0].samples, found[1].samples) == (8.0, 16.0)
    assert found[1].latest.noise == pytest.approx(2.0 * found[0].latest.noise)
    assert found[1].latest.signal == pytest.approx(found[0].latest.signal)


FORMS = {
    "beside": None,
    "leave one out": lambda ps: BiasCorrectedAdamW(ps, lr=1e-9, warm_start=0),
    "exact": lambda ps: BiasCorrectedAdamW(ps, lr=1e-9, warm_start=0, folds="exact"),
    "split": lambda ps: BiasCorrectedAdamW(ps, lr=1e-9, warm_start=0, cross_fit="split"),
    "symmetric": lambda ps: BiasCorrectedAdamW(ps, lr=1e-9, warm_start=0, cross_fit="symmetric"),
    "sophia": lambda ps: BiasCorrectedSophia(ps, lr=1e-9, hessian_freq=10**6),
    "shampoo": lambda ps: BiasCorrectedShampoo(ps, lr=1e-9, root_freq=10**6),
}
LARGEST_Z = 4.5  # two-sided probability 7e-6 a number


@pytest.mark.parametrize("weights", [(1.0,) * 4, (4.0, 1.0, 2.0, 1.0)])
@pytest.mark.parametrize("form", FORMS)
def test_estimates_are_unbiased(form, weights):
    """Gradients G + noise/√w with |G|² = 1.25 and tr Σ = 9 in 120 steps; z of both means is bounded."""
    expectation, spread = torch.tensor([[1.0, 0.5], [0.0, 0.0]]), torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    weight = nn.Parameter(torch.zeros(2, 2))
    if FORMS[form] is None:
        optimizer = torch.optim.SGD([weight], lr=0.0)
        source = GradientNoise([weight])
        source.attach(optimizer)
    else:
        source = optimizer = FORMS[form]([weight])
    generator = torch.Generator().manual_seed(3)
    found = []
    for step in range(120):
        for w in weights:
            if step == 0 and hasattr(optimizer, "add_curvature"):
                optimizer.add_curvature((weight * spread).sum())
            gradient = expectation + spread * torch.randn(2, 2, generator=generator) / math.sqrt(w)
            source.set_microbatch_weight(w)
            (w * (weight * gradient).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(source.noise_scale().latest)
    scale = sum(weights)  # losses were not divided: p.grad is W times the mean
    values = torch.tensor(found, dtype=torch.float64) / scale**2
    z = (values.mean(dim=0) - torch.tensor([1.25, 9.0])) / (values.std(dim=0) / math.sqrt(len(found)))
    assert z.abs().max() < LARGEST_Z, z
    smoothed = source.noise_scale().smoothed
    gain = 1.0 - 0.5 ** (1.0 / 50.0)
    average = torch.zeros(2, dtype=torch.float64)
    for value in values:
        average.lerp_(value, gain)
    average /= 1.0 - (1.0 - gain) ** len(found)
    torch.testing.assert_close(torch.tensor(smoothed, dtype=torch.float64) / scale**2, average, rtol=1e-5, atol=1e-5)


def zero(tensors):
    for tensor in tensors:
        tensor.zero_()


DISCARDED = {
    "optimizer.zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer.zero_grad(False)": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda model, optimizer: model.zero_grad(),
    "p.grad.data.zero_()": lambda model, optimizer: zero(p.grad.data for p in model.parameters()),
}


@pytest.mark.parametrize("way", DISCARDED)
@pytest.mark.parametrize("form", ["beside", "leave one out"])
@pytest.mark.parametrize("count", [1, 3])
def test_discarded_microbatches_do_not_count(form, way, count):
    found = []
    for interrupt in (False, True):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if form == "beside" else adamw(model)
        source = GradientNoise(model) if form == "beside" else optimizer
        if form == "beside":
            source.attach(optimizer)
        for seed in range(3):
            if interrupt:
                for x in examples(count, 100 + seed).unbind():
                    model(x).square().mean().backward()
                DISCARDED[way](model, optimizer)
            for x in examples(4, seed).unbind():
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(source.noise_scale())
    assert found[0] == found[1]


def test_a_step_that_a_scaler_skips_does_not_count():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = GradientNoise(model)
    noise.attach(optimizer)
    for skipped in (True, False):
        for x in examples(2 + skipped).unbind():
            model(x).square().mean().backward()
        if not skipped:
            optimizer.step()
        optimizer.zero_grad()
    assert (noise.noise_scale().steps, noise.noise_scale().samples) == (1, 2.0)


def test_gradients_changed_in_between_are_left_out_with_one_warning():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = GradientNoise(model)
    noise.attach(optimizer)

    def step(change):
        for x in examples(3).unbind():
            model(x).square().mean().backward()
            if change:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()

    step(change=False)
    first = noise.noise_scale()
    step(change=True)  # left out: something happened, and the next step is looked at more closely
    with pytest.warns(UserWarning, match="no gradient noise scale of this step.*changed between two microbatches"):
        step(change=True)
    step(change=True)  # says nothing more
    assert noise.noise_scale() == first
    for count in (2, 3):
        step(change=False)
        assert noise.noise_scale().steps == count
    close(noise.noise_scale().smoothed, first.smoothed)


def test_one_microbatch_and_infinite_gradients_say_nothing():
    for form in ("beside", "leave one out"):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0) if form == "beside" else adamw(model)
        noise = GradientNoise(model) if form == "beside" else optimizer
        if form == "beside":
            noise.attach(optimizer)
        with pytest.raises(RuntimeError, match="no step with at least two microbatches.*Accumulate gradients"):
            noise.noise_scale()
        counts = []
        for rows in ([1.0, 2.0], [1.0], [1.0, math.inf], [1.0, 2.0, 3.0]):
            for row in rows:
                (model(torch.full((3,), 0.5, dtype=torch.float64)) * row).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.load_state_dict(make_model().state_dict())  # SGD has taken the infinite step
            counts.append(noise.noise_scale().steps)
        assert counts == [1, 1, 1, 2], form
        assert all(map(math.isfinite, noise.noise_scale().smoothed))


def test_a_step_shorter_than_the_one_before_is_left_out_and_no_other():
    """Norms are measured where the step before ended, and everywhere again if gradients may have been changed."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise, counts = GradientNoise(model), []
    noise.attach(optimizer)
    for rows in (4, 4, 2, 4, 6, 4, 4):
        for x in examples(rows).unbind():
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(noise.noise_scale().steps)
        wanted = expected(rows * per_example(model, examples(rows)), [1.0] * rows, rows)
        if len(counts) == 1 or counts[-1] > counts[-2]:
            close(noise.noise_scale().latest, wanted)
    assert counts == [1, 2, 2, 3, 4, 4, 5]


def test_no_signal_is_infinite_scale():
    assert NoiseEstimate(-0.5, 2.0).scale == NoiseEstimate(0.0, 2.0).scale == math.inf
    assert NoiseEstimate(0.5, 2.0).scale == 4.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_primal_averaging_closures_and_narrow_parameters(dtype):
    model = make_model().to(dtype)
    optimizer = PrimalAveraging(torch.optim.SGD(model.parameters(), lr=0.1))
    noise = GradientNoise(model.named_parameters())
    noise.attach(optimizer)
    reference = GradientNoise(model)
    x = examples(4).to(dtype)

    def closure():
        optimizer.zero_grad()
        for row in x.unbind():
            loss = model(row).square().mean()
            loss.backward()
        return loss

    closure()
    reference.update()
    for _ in range(2):
        optimizer.step(closure)
    assert noise.noise_scale().steps == 2
    model2 = make_model().to(dtype)
    gradients = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(model2(row).square().mean(), [*model2.parameters()])])
            for row in x.unbind()
        ]
    )
    wanted = expected(16.0**0.5 * gradients.double(), [1.0] * 4, 4)
    close(reference.noise_scale().latest, wanted, 2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_parameters_that_take_no_part():
    """A frozen parameter and a group without gradients are left out; groups may come later."""
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = adamw(model)
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2, dtype=torch.float64)))]})
    noise = GradientNoise([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    noise.attach(optimizer)
    for x in examples(3).unbind():
        model(x).square().mean().backward()
    optimizer.step()
    assert [group.group for group in noise.noise_scale().groups] == [1]
    assert [group.group for group in optimizer.noise_scale().groups] == [0]
    close(noise.noise_scale().latest, optimizer.noise_scale().latest)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.noise_scale()


def test_checkpointed_backward_is_one_microbatch():
    model = make_model()
    found = []
    for reentrant in (None, True, False):
        noise = GradientNoise(model)
        for x in examples(2).unbind():
            x = x.clone().requires_grad_(True)
            hidden = (
                model[:2](x)
                if reentrant is None
                else torch.utils.checkpoint.checkpoint(model[:2], x, use_reentrant=reentrant)
            )
            model[2](hidden).square().mean().backward()
        noise.update()
        model.zero_grad()
        found.append(noise.noise_scale().latest)
    close(found[1], found[0])
    close(found[2], found[0])


def test_squares_keep_their_digits_at_any_size():
    ones = torch.ones(2**25 + 3)
    assert float(squared_norm(ones)) == 2**25 + 3
    strided = torch.arange(6.0).view(2, 3).T
    assert float(squared_norm(strided)) == pytest.approx(55.0)
    assert float(squared_norm(torch.full((4,), 2.0, dtype=torch.bfloat16))) == 16.0


def test_statistics_of_one_half_are_unbiased_too():
    """E a = |G|² + s·tr Σ solved for both: exact expectations in, |G|² and tr Σ out."""
    for spread in (1.0, 0.5, 1.0 / 3.0):
        found = noise_moments(2.0 + 3.0 * spread, 2.0 + 3.0 / 8.0, spread, 8.0)
        assert (found.signal, found.noise) == (pytest.approx(2.0), pytest.approx(3.0))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"params": []}, "no parameters"),
        ({"params": [1]}, "1 is no parameter"),
        ({"params": [torch.ones(1, dtype=torch.complex64, requires_grad=True)]}, "view_as_real"),
        ({"samples_per_microbatch": 0}, "samples_per_microbatch=0; it must be a finite number > 0 or None"),
        ({"samples_per_microbatch": math.nan}, "samples_per_microbatch=nan"),
        ({"half_life": -1.0}, "half_life=-1.0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientNoise(**{"params": [nn.Parameter(torch.ones(1))], **arguments})


def test_bad_calls():
    noise = lagless.GradientNoise(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"not a Linear; call update\(\)"):
        noise.attach(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="weight=-1"):
        noise.set_microbatch_weight(-1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise.update()  # no gradients yet: nothing happens


def test_half_of_the_microbatches_weighed_is_refused():
    model = make_model()
    noise = GradientNoise(model)
    noise.set_microbatch_weight(2.0)
    for x in examples(2).unbind():
        model(x).square().mean().backward()
    with pytest.raises(RuntimeError, match="1 of 2 microbatches of this step were given a weight"):
        noise.update()


def test_a_forgotten_monitor_and_a_removed_handle_do_nothing():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kept = GradientNoise(model)
    handle = kept.attach(optimizer)
    GradientNoise(model).attach(optimizer)
    handle.remove()
    with contextlib.suppress(RuntimeError):
        for x in examples(2).unbind():
            model(x).square().mean().backward()
        optimizer.step()
        kept.noise_scale()
        pytest.fail("a removed handle has counted a step")
