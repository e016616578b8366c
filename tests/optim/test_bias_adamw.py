"""BiasCorrectedAdamW: microbatches seen through ordinary backward() calls."""

import copy
import json
from pathlib import Path

import pytest
import torch

from lagless.optim import BiasCorrectedAdamW
from lagless.testing import OPTIMIZER_CHECKS

VECTORS = json.loads(Path(__file__).with_name("bias_correction_vectors.json").read_text())

SETTINGS = {
    "post_std": {"cross_fit": "none"},
    "post_cf": {"cross_fit": "split"},
    "post_inv": {"cross_fit": "none", "inverse_correction": "post_ema", "folds": "exact"},
    "post_full": {"cross_fit": "split", "inverse_correction": "post_ema"},
    "pre_full_REFERENCE": {"cross_fit": "split", "inverse_correction": "pre_ema", "constants": "reference"},
    "pre_full_CORRECT": {"cross_fit": "split", "inverse_correction": "pre_ema"},
    "pre_inv_REFERENCE": {"cross_fit": "none", "inverse_correction": "pre_ema", "constants": "reference"},
    "post_cf_alpha0.25": {"cross_fit": "split", "alpha": 0.25},
    "post_cf_adaptive1": {"cross_fit": "split", "adaptive_alpha": True},
    "post_full_tau1": {"cross_fit": "split", "inverse_correction": "post_ema", "support_clip": 1.0},
    "post_full_uclip0.5": {"cross_fit": "split", "inverse_correction": "post_ema", "update_clip": 0.5},
    "sym_std": {"cross_fit": "none"},
    "sym_cf": {"cross_fit": "symmetric"},
    "sym_full": {"cross_fit": "symmetric", "inverse_correction": "post_ema"},
    "loo_exact": {"cross_fit": "leave_one_out", "folds": "exact"},
    "loo_jensen_REFERENCE": {"inverse_correction": "jackknife", "folds": "exact", "constants": "reference"},
    "loo_jensen_JACKKNIFE": {"inverse_correction": "jackknife", "folds": "exact"},
    "loo_singlepass_g2": {"cross_fit": "leave_one_out"},
    "loo_singlepass_g3": {"cross_fit": "leave_one_out", "folds": "skewed"},
    "std_gradclip1_CLEAN": {"cross_fit": "none"},
    "loo_gradclip1_CLEAN": {"cross_fit": "leave_one_out", "folds": "exact"},
}


def accumulate(parameters, gradients, divide=True):
    """One backward() call per microbatch, each with the given gradient of each parameter."""
    n = len(gradients)
    for microbatch in gradients:
        loss = sum((p * g.to(p.dtype)).sum() for p, g in zip(parameters, microbatch, strict=True))
        (loss / n if divide else loss).backward()


def run(optimizer, parameters, steps, clip=None, **options):
    """Optimizer steps from microbatch gradients, (steps, microbatches, parameters)."""
    for gradients in steps:
        optimizer.zero_grad()
        accumulate(parameters, gradients, **options)
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()


def gradients_of(seed, steps, microbatches, shapes, mean=0.3):
    generator = torch.Generator().manual_seed(seed)
    return [
        [[torch.randn(shape, generator=generator, dtype=torch.float64) + mean for shape in shapes] for _ in range(n)]
        for n in ([microbatches] * steps if isinstance(microbatches, int) else microbatches)
    ]


def parameters_of(shapes, dtype=torch.float64, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_published_parameters(name, dtype):
    inputs = VECTORS["inputs"]["adamw"]
    h = inputs["hyper"]
    p = torch.tensor(inputs["p0"], dtype=dtype, requires_grad=True)
    defaults = {"lr": h["lr"], "betas": tuple(h["betas"]), "eps": h["eps"], "weight_decay": h["wd"], "warm_start": 0}
    optimizer = BiasCorrectedAdamW([("w", p)], **defaults | SETTINGS[name])
    for step, batch in enumerate(inputs["grads"]):
        # halves alternate: A, B, A, B
        order = [0, 2, 1, 3] if optimizer.param_groups[0]["cross_fit"] in ("split", "symmetric") else [0, 1, 2, 3]
        gradients = [[torch.tensor(batch[j], dtype=torch.float64)] for j in order]
        run(optimizer, [p], [gradients], clip=1.0 if "gradclip1" in name else None)
        expected = torch.tensor(VECTORS["outputs"][f"adamw_{name}"][step]["p"], dtype=dtype)
        # ε = 1e-3 is all that divides a coordinate of these: rounding errors of float32 are multiplied by 1e3.
        ill_conditioned = name.startswith("loo") and dtype == torch.float32
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4 if ill_conditioned else 1e-6
        torch.testing.assert_close(p.detach(), expected, rtol=tolerance, atol=tolerance)


FORMS = [
    {"cross_fit": "none"},
    {"cross_fit": "none", "inverse_correction": "post_ema"},
    {"cross_fit": "none", "inverse_correction": "pre_ema"},
    {"cross_fit": "split"},
    {"cross_fit": "split", "inverse_correction": "post_ema"},
    {"cross_fit": "split", "inverse_correction": "pre_ema"},
    {"cross_fit": "symmetric"},
    {"cross_fit": "symmetric", "inverse_correction": "pre_ema"},
    {"cross_fit": "leave_one_out"},
    {"cross_fit": "leave_one_out", "inverse_correction": "jackknife"},
    {"cross_fit": "leave_one_out", "folds": "skewed"},
    {"cross_fit": "leave_one_out", "folds": "exact"},
]
SHAPES = [(3, 4), (5,), ()]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))


def make(parameters, **settings):
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    return BiasCorrectedAdamW(named, **{"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1, "warm_start": 0} | settings)


def trained(steps, form, dtype=torch.float64, clip=None, divide=True, shapes=SHAPES, **settings):
    parameters = parameters_of(shapes, dtype)
    optimizer = make(parameters, **form, **settings)
    run(optimizer, parameters, steps, clip, divide=divide)
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("warm_start", [0, 100])
def test_standard_is_torch_adamw(clip, dtype, warm_start):
    steps = gradients_of(1, 5, 4, SHAPES)
    parameters = parameters_of(SHAPES, dtype)
    reference = torch.optim.AdamW(parameters, lr=0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)
    run(reference, parameters, steps, clip)
    expected = torch.cat([p.detach().flatten() for p in parameters])
    # A warm start of a corrected form takes plain steps too.
    form = {"cross_fit": "leave_one_out" if warm_start else "none"}
    found = trained(steps, form, dtype, clip, warm_start=warm_start)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@forms
def test_identical_microbatches_give_the_standard_update(form):
    steps = [[microbatches[0]] * 6 for microbatches in gradients_of(2, 4, 1, SHAPES)]
    torch.testing.assert_close(trained(steps, form), trained(steps, {"cross_fit": "none"}), rtol=1e-8, atol=1e-8)


@forms
def test_order_of_microbatches(form):
    steps = gradients_of(3, 3, 6, SHAPES)
    expected = trained(steps, form)
    within_halves = [[s[j] for j in (4, 3, 0, 5, 2, 1)] for s in steps]
    torch.testing.assert_close(trained(within_halves, form), expected, rtol=1e-9, atol=1e-9)
    swapped = [[s[j] for j in (1, 0, 3, 2, 5, 4)] for s in steps]
    same = torch.allclose(trained(swapped, form), expected, rtol=1e-9, atol=1e-9)
    assert same == (form["cross_fit"] != "split")


@forms
def test_scale_and_division_of_the_loss(form):
    steps = gradients_of(4, 3, 6, SHAPES)
    scaled = [[[7.0 * g for g in microbatch] for microbatch in s] for s in steps]
    expected = trained(steps, form)
    torch.testing.assert_close(trained(scaled, form, eps=7e-3), expected, rtol=1e-9, atol=1e-9)
    # Sums instead of means are gradients that are 6 times as large.
    torch.testing.assert_close(trained(steps, form, divide=False, eps=6e-3), expected, rtol=1e-9, atol=1e-9)


def test_scale_with_support_clip():
    form = {"cross_fit": "split", "inverse_correction": "pre_ema", "support_clip": 1.0}
    steps = gradients_of(4, 3, 6, SHAPES)
    scaled = [[[7.0 * g for g in microbatch] for microbatch in s] for s in steps]
    found = trained(scaled, form, eps=7e-3, support_eps=49e-6)
    torch.testing.assert_close(found, trained(steps, form, support_eps=1e-6), rtol=1e-9, atol=1e-9)


@forms
def test_zero_gradients_move_nothing_but_the_decay(form):
    p = torch.ones(3, requires_grad=True)
    optimizer = make([p], **form, lr=0.1)
    run(optimizer, [p], [[[torch.tensor([0.0, 1.0, 0.0])]] * 4] * 3)
    assert torch.equal(p.detach()[[0, 2]], torch.full((2,), 1.0).mul(1 - 0.01).mul(1 - 0.01).mul(1 - 0.01))
    assert p.isfinite().all()


def test_one_microbatch():
    p = torch.ones(3, requires_grad=True)
    optimizer = make([p])
    p.sum().backward()
    with pytest.raises(RuntimeError, match="needs the gradients of at least 2 microbatches per step and saw 1"):
        optimizer.step()
    steps = gradients_of(5, 1, [4, 1], SHAPES)
    # The remainder of an epoch may be one: a standard step.
    assert trained(steps, {"cross_fit": "leave_one_out"}).isfinite().all()


@pytest.mark.parametrize("halves", ["split", "symmetric"])
def test_one_microbatch_per_half_has_no_variance(halves):
    steps = gradients_of(6, 2, 2, SHAPES)
    for correction in ("post_ema", "pre_ema"):
        found = trained(steps, {"cross_fit": halves, "inverse_correction": correction})
        torch.testing.assert_close(found, trained(steps, {"cross_fit": halves}), rtol=0, atol=0)


@pytest.mark.parametrize("correction", ["none", "jackknife"])
@pytest.mark.parametrize("folds", ["moments", "skewed"])
def test_quadrature_is_exact_for_two_folds(correction, folds):
    steps = gradients_of(7, 3, 2, SHAPES)
    form = {"cross_fit": "leave_one_out", "inverse_correction": correction}
    exact = trained(steps, form | {"folds": "exact"})
    torch.testing.assert_close(trained(steps, form | {"folds": folds}), exact, rtol=1e-7, atol=1e-7)


def test_quadrature_error_shrinks_with_the_number_of_folds():
    """Skewed noise, after a warm start: relative to the correction, the error falls at least like 1/n."""
    errors = {}
    for n in (4, 16, 64):
        generator = torch.Generator().manual_seed(8)
        noise = torch.empty(24, n, 200, dtype=torch.float64).exponential_(generator=generator) - 0.7
        steps = [[[g] for g in microbatches] for microbatches in noise]
        final = {}
        for folds in ("moments", "skewed", "exact", "standard"):
            form = {"cross_fit": "none"} if folds == "standard" else {"cross_fit": "leave_one_out", "folds": folds}
            p = torch.zeros(200, dtype=torch.float64, requires_grad=True)
            optimizer = make([p], **form, weight_decay=0.0, eps=1e-8, warm_start=23)
            run(optimizer, [p], steps)
            final[folds] = p.detach()
        size = (final["exact"] - final["standard"]).norm()
        errors[n] = [float((final[f] - final["exact"]).norm() / size) for f in ("moments", "skewed")]
    assert errors[64][0] < errors[16][0] < errors[4][0] and errors[64][0] < 0.25
    assert all(skewed < 0.5 * two for two, skewed in errors.values())


@forms
def test_blocks_equal_the_pure_update(form):
    """One tensor of several blocks and the same coordinates as a tensor that is not contiguous: one block."""
    shape = (300, 250)
    steps = gradients_of(10, 2, 4, [shape])
    turned = [[[g.T.contiguous().T for g in microbatch] for microbatch in s] for s in steps]
    whole = parameters_of([shape])[0].detach().T.contiguous().T.requires_grad_()
    optimizer = make([whole], **form)
    run(optimizer, [whole], turned)
    assert not whole.is_contiguous()
    torch.testing.assert_close(whole.detach().flatten(), trained(steps, form, shapes=[shape]), rtol=1e-12, atol=1e-12)


# --- what happens to gradients on the way ----------------------------------------------------------------------------


@forms
def test_clipping_scales_all_microbatches(form):
    """Gradients clipped by hand beforehand, c = min(1, max_norm/(‖ḡ‖ + 1e-6))."""
    steps = gradients_of(11, 3, 4, SHAPES)
    clipped = []
    for s in steps:
        norm = torch.stack([torch.stack(g).mean(0).norm() for g in zip(*s, strict=True)]).norm()
        c = min(1.0, 0.5 / (float(norm) + 1e-6))
        clipped.append([[c * g for g in microbatch] for microbatch in s])
    torch.testing.assert_close(trained(steps, form, clip=0.5), trained(clipped, form), rtol=1e-8, atol=1e-8)


@forms
def test_grad_scaler(form):
    steps = gradients_of(12, 4, 4, SHAPES)
    parameters = parameters_of(SHAPES)
    optimizer = make(parameters, **form)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for number, gradients in enumerate(steps):
        optimizer.zero_grad()
        for microbatch in gradients:
            loss = sum((p * g).sum() for p, g in zip(parameters, microbatch, strict=True)) / 4
            scaler.scale(loss).backward()
        if number == 2:
            parameters[0].grad.fill_(float("inf"))  # pyright: ignore
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
    found = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(found, trained([steps[i] for i in (0, 1, 3)], form, clip=1.0), rtol=1e-8, atol=1e-8)


@forms
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_microbatch_that_is_not_finite_skips_the_step(form, bad):
    steps = gradients_of(13, 3, 4, SHAPES)
    parameters = parameters_of(SHAPES)
    optimizer = make(parameters, **form)
    run(optimizer, parameters, steps[:1])
    before = copy.deepcopy((optimizer.state_dict()["state"], parameters))
    steps[1][2][1][3] = bad
    run(optimizer, parameters, steps[1:2])
    assert bool(optimizer.found_inf)
    after = (optimizer.state_dict()["state"], parameters)
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    for key, state in before[0].items():
        assert all(torch.equal(value, after[0][key][name]) for name, value in state.items())
    run(optimizer, parameters, steps[2:])
    assert not bool(optimizer.found_inf)
    found = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(found, trained([steps[0], steps[2]], form), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", [{"cross_fit": "split"}, {"folds": "skewed"}], ids=str)
def test_a_sum_that_is_not_finite_skips_the_step(form, bad):
    """Whatever the gradient itself is."""
    [steps] = gradients_of(13, 1, 4, SHAPES)
    parameters = parameters_of(SHAPES)
    optimizer = make(parameters, **form)
    before = [p.detach().clone() for p in parameters]
    steps[0][1][3] = bad
    accumulate(parameters, steps)
    for p in parameters:
        p.grad.nan_to_num_(1.0, 1.0, 1.0)
    optimizer.step()
    assert bool(optimizer.found_inf)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_may_have_a_graph():
    found = []
    for create_graph in (False, True):
        weight = torch.nn.Parameter(torch.arange(1.0, 6.0))
        optimizer = make([weight], inverse_correction="jackknife")
        for step in range(3):
            for j in range(4):
                ((j + step + 1.0) * weight.pow(3).sum()).backward(create_graph=create_graph)
            optimizer.step()
            state = optimizer.state[weight].values()
            assert not any(t.requires_grad for t in state)
            weight.grad = None
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("forget", ["set to none", "zero in place", "by hand"])
def test_abandoned_gradients_are_forgotten(forget):
    abandoned, *steps = gradients_of(14, 3, 4, SHAPES)
    parameters = parameters_of(SHAPES)
    optimizer = make(parameters)
    accumulate(parameters, abandoned)
    if forget == "by hand":
        for p in parameters:
            p.grad = None
    else:
        optimizer.zero_grad(set_to_none=forget == "set to none")
    for gradients in steps:
        accumulate(parameters, gradients)
        optimizer.step()
        optimizer.zero_grad(set_to_none=forget != "zero in place")
    found = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(found, trained(steps, {}), rtol=1e-12, atol=1e-12)


@forms
def test_a_missing_gradient_is_zero(form):
    """Parameter 1 has no part in microbatches 0 and 3."""
    steps = gradients_of(15, 3, 4, SHAPES)
    for s in steps:
        s[0][1], s[3][1] = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    parameters = parameters_of(SHAPES)
    optimizer = make(parameters, **form)
    for s in steps:
        optimizer.zero_grad()
        for j, microbatch in enumerate(s):
            pairs = [
                (p, g) for i, (p, g) in enumerate(zip(parameters, microbatch, strict=True)) if i != 1 or j in (1, 2)
            ]
            (sum((p * g).sum() for p, g in pairs) / 4).backward()
        optimizer.step()
    found = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(found, trained(steps, form), rtol=1e-12, atol=1e-12)


def test_other_gradients_are_no_microbatches():
    """torch.autograd.grad leaves p.grad and our sums alone."""
    steps = gradients_of(16, 2, 4, SHAPES)
    parameters = parameters_of(SHAPES)
    optimizer = make(parameters)
    for s in steps:
        optimizer.zero_grad()
        for microbatch in s:
            torch.autograd.grad(sum(p.square().sum() for p in parameters), parameters)
            accumulate(parameters, [[g / 4 for g in microbatch]])
            torch.autograd.grad(sum(p.square().sum() for p in parameters), parameters)
        optimizer.step()
    found = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(found, trained(steps, {}), rtol=1e-12, atol=1e-12)


class Tied(torch.nn.Module):
    """Two blocks between tied input and output weights, checkpointed or not."""

    def __init__(self, checkpoint):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(7, 4, generator=generator))
        self.blocks = torch.nn.ParameterList(torch.randn(4, 4, generator=generator) for _ in range(2))
        self.checkpoint = checkpoint

    def forward(self, tokens):
        x = self.table[tokens]
        for weight in self.blocks:
            if self.checkpoint is None:
                x = x + torch.tanh(x @ weight)
            else:
                x = torch.utils.checkpoint.checkpoint(
                    lambda y, w: y + torch.tanh(y @ w), x, weight, use_reentrant=self.checkpoint
                )
        return torch.nn.functional.cross_entropy((x @ self.table.T).flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize("checkpoint", [None, False, True])
def test_tied_weights_checkpointing_and_number_of_passes(checkpoint):
    """Microbatch gradients by torch.autograd.grad, fed one by one to an optimizer of plain tensors."""
    generator = torch.Generator().manual_seed(3)
    batches = torch.randint(7, (2, 4, 3, 5), generator=generator)
    model, twin = Tied(checkpoint), Tied(None)
    passes = []
    model.register_forward_hook(lambda *_: passes.append("forward"))
    model.table.register_hook(lambda _: passes.append("backward"))
    optimizer = make(model.parameters())
    plain = [p.detach().clone().requires_grad_() for p in twin.parameters()]
    reference = make(plain)
    for step in batches:
        optimizer.zero_grad()
        gradients = []
        for tokens in step:
            (model(tokens) / 4).backward()
            gradients.append(torch.autograd.grad(twin(tokens), list(twin.parameters())))
        optimizer.step()
        run(reference, plain, [gradients])
        with torch.no_grad():
            for p, q in zip(twin.parameters(), plain, strict=True):
                p.copy_(q)
    for p, q in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-5)
    assert passes.count("forward") == passes.count("backward") == 8


def fed(parameters, microbatches):
    """One backward() call per microbatch, of the parameters that it has a gradient for (None: none)."""
    for gradients in microbatches:
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        (sum((p * g).sum() for p, g in pairs) / len(microbatches)).backward()


@forms
def test_gradients_missing_in_any_order_are_zero(form):
    """Parameter 1 skips microbatches 0 and 3, and arrives before or after parameter 0 in the others."""
    present = gradients_of(22, 1, 6, [(), ()])[0]
    expected = parameters_of([(), ()])
    run(make(expected, **form), expected, [[[a, b * (j not in (0, 3))] for j, (a, b) in enumerate(present)]])
    for turned in (False, True):
        parameters = parameters_of([(), ()])
        rows = [[a, None if j in (0, 3) else b] for j, (a, b) in enumerate(present)]
        optimizer = make(parameters, **form)
        order = slice(None, None, -1 if turned else 1)
        fed(parameters[order], [row[order] for row in rows])
        optimizer.step()
        assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(parameters, expected, strict=True))


def test_microbatches_without_a_common_parameter():
    present = gradients_of(23, 1, 4, [(3,)])[0]
    expected, parameters = parameters_of([(3,), (3,)]), parameters_of([(3,), (3,)])
    zero = torch.zeros(3, dtype=torch.float64)
    run(make(expected), expected, [[[zero, g] if j % 2 else [g, zero] for j, (g,) in enumerate(present)]])
    optimizer = make(parameters)
    fed(parameters, [[None, g] if j % 2 else [g, None] for j, (g,) in enumerate(present)])
    assert optimizer._microbatches.begun == 4
    optimizer.step()
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("outer", ["none", "before", "after"])
def test_reentrant_checkpoints_are_within_a_microbatch(outer):
    """Passes of their own, for weights that a checkpointed segment finds by itself, as modules do."""
    inner, (outside,) = parameters_of([(4, 4)] * 3), parameters_of([(4,)])
    optimizer = make([*inner, *([] if outer == "none" else [outside])])
    for batch in range(3):
        x = torch.ones(4, dtype=torch.float64, requires_grad=True)
        x = x * outside if outer == "before" else x
        for weight in inner[: 2 if batch == 1 else 3]:
            x = torch.utils.checkpoint.checkpoint(lambda y, w=weight: torch.tanh(y @ w), x, use_reentrant=True)
        (x * outside if outer == "after" else x).sum().backward()
        assert optimizer._microbatches.begun == batch + 1
    optimizer.step()


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("form", [f for f in FORMS if f["cross_fit"] in ("split", "symmetric")], ids=str)
def test_a_gradient_in_one_half_only_gives_a_standard_step(form, half):
    parameters, plain = parameters_of([(4,), (4,)]), parameters_of([(4,)], seed=1)
    with torch.no_grad():
        plain[0].copy_(parameters[1])
    drawn = gradients_of(24, 1, 4, [(4,), (4,)])[0]
    optimizer = make(parameters, **form, eps=1e-8)
    fed(parameters, [[a, b if j % 2 == half else None] for j, (a, b) in enumerate(drawn)])
    optimizer.step()
    standard = make(plain, cross_fit="none", eps=1e-8)
    plain[0].grad = sum(b for j, (_, b) in enumerate(drawn) if j % 2 == half) / 4
    standard.step()
    torch.testing.assert_close(parameters[1].detach(), plain[0].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1])
def test_parameters_may_be_frozen_when_the_optimizer_is_made(frozen):
    steps = gradients_of(25, 2, 4, [(3,), (3,)])
    parameters, expected = parameters_of([(3,), (3,)]), parameters_of([(3,), (3,)])
    parameters[frozen].requires_grad_(False)
    optimizer = make(parameters)
    assert not parameters[frozen].requires_grad
    start = parameters[frozen].clone()
    fed(parameters[::-1], [[None if i == frozen else g for i, g in enumerate(m)][::-1] for m in steps[0]])
    optimizer.step()
    assert torch.equal(parameters[frozen], start)
    optimizer.zero_grad()
    parameters[frozen].requires_grad_(True)
    run(optimizer, parameters, steps[1:])
    run(make(expected), expected, steps[1:])
    torch.testing.assert_close(parameters[frozen].detach(), expected[frozen].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [f for f in FORMS if "inverse_correction" in f or "folds" in f], ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e10, 1e14])
def test_sums_that_overflow_skip_the_step(form, scale):
    """Gradients whose sum is finite, while their third or fourth power is not, and those where it just is."""
    p = torch.ones(64, requires_grad=True)
    optimizer = make([p], **form)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for _ in range(4):
            (p * torch.randn(64, generator=generator) * scale).sum().backward()
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert p.isfinite().all()
        assert not (scale == 1e4 and bool(optimizer.found_inf))
    assert not torch.equal(p.detach(), torch.ones(64)) or bool(optimizer.found_inf)


@pytest.mark.parametrize("correction", ["post_ema", "pre_ema"])
@pytest.mark.parametrize("scale", [1e-6, 1e-12])
def test_corrections_do_not_depend_on_the_scale_of_small_gradients(correction, scale):
    form = {"cross_fit": "split", "inverse_correction": correction}
    steps = gradients_of(26, 2, 8, SHAPES)
    small = [[[scale * g for g in microbatch] for microbatch in s] for s in steps]
    found = trained(small, form, eps=1e-3 * scale)
    torch.testing.assert_close(found, trained(steps, form), rtol=1e-9, atol=1e-9)


def test_loading_between_backward_and_step_is_said(caplog):
    parameters = parameters_of(SHAPES)
    optimizer = make(parameters)
    steps = gradients_of(27, 2, 4, SHAPES)
    run(optimizer, parameters, steps[:1])
    state = copy.deepcopy(optimizer.state_dict())
    caplog.clear()
    optimizer.load_state_dict(state)
    assert not caplog.text
    accumulate(parameters, steps[1])
    optimizer.load_state_dict(state)
    assert "loaded between backward() and step(); 4 microbatches" in caplog.text


def test_gradients_of_autograd_grad_are_not_kept():
    parameters = parameters_of(SHAPES)
    optimizer = make(parameters)
    fed(parameters, [[torch.ones(()) for _ in parameters]])
    torch.autograd.grad(sum(p.square().sum() for p in parameters), parameters)
    optimizer.zero_grad()
    assert not optimizer._microbatches.hooks._incoming


def test_the_shared_table_of_t5_is_an_embedding():
    named = zip(["shared.weight", "block.mlp.shared_expert.up.weight"], parameters_of([(3, 4), (3, 4)]), strict=True)
    corrected, standard = BiasCorrectedAdamW(named).param_groups
    assert standard["param_names"] == ["shared.weight"] and len(corrected["params"]) == 1


# --- conformance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
def test_conformance_of_the_standard_form(check):
    check(lambda params: BiasCorrectedAdamW(params, lr=0.01, cross_fit="none"))


@pytest.mark.parametrize("form", [FORMS[5], FORMS[6], FORMS[9]], ids=lambda form: "-".join(form.values()))
@pytest.mark.parametrize("check", OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
def test_conformance_with_microbatches(form, check):
    check(lambda params: BiasCorrectedAdamW(params, lr=0.01, warm_start=2, **form), microbatches=4)


# --- states and groups -----------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_resumed_equals_never_stopped(form, dtype, tmp_path):
    steps = gradients_of(17, 5, 4, SHAPES)
    parameters = parameters_of(SHAPES, dtype)
    optimizer = make(parameters, **form)
    run(optimizer, parameters, steps[:2])
    torch.save([optimizer.state_dict(), parameters], tmp_path / "state.pt")
    run(optimizer, parameters, steps[2:])
    state, resumed = torch.load(tmp_path / "state.pt", weights_only=True)
    another = make(resumed, **form)
    another.load_state_dict(state)
    run(another, resumed, steps[2:])
    assert all(torch.equal(p, q) for p, q in zip(parameters, resumed, strict=True))
    wide = torch.promote_types(dtype, torch.float32)
    assert all(s["exp_avg"].dtype == s["exp_avg_sq"].dtype == wide for s in another.state.values())


def test_copies_carry_on():
    steps = gradients_of(21, 4, 4, SHAPES)
    parameters = parameters_of(SHAPES)
    optimizer = make(parameters)
    run(optimizer, parameters, steps[:2])
    clone = copy.deepcopy(optimizer)
    copied = [p for group in clone.param_groups for p in group["params"]]
    assert repr(clone) == repr(optimizer) and clone.correction_report() == optimizer.correction_report()
    run(clone, copied, steps[2:])
    run(optimizer, parameters, steps[2:])
    assert all(torch.equal(p, q) for p, q in zip(parameters, copied, strict=True))


def test_states_of_torch_adamw_load():
    steps = gradients_of(18, 4, 4, SHAPES)
    parameters = parameters_of(SHAPES)
    plain = torch.optim.AdamW(parameters, lr=0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)
    run(plain, parameters, steps[:2])
    optimizer = make(parameters, cross_fit="none")
    optimizer.load_state_dict(plain.state_dict())
    run(optimizer, parameters, steps[2:])
    found = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(found, trained(steps, {"cross_fit": "none"}), rtol=1e-13, atol=1e-13)


def test_embeddings_are_standard_and_that_is_said(caplog):
    parameters = parameters_of(SHAPES)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.bias"]
    optimizer = BiasCorrectedAdamW(zip(names, parameters, strict=True), lr=0.1)
    corrected, standard = optimizer.param_groups
    assert corrected["param_names"] == ["model.norm.weight"] and corrected["cross_fit"] == "leave_one_out"
    assert standard["param_names"] == [names[0], names[2]] and standard["cross_fit"] == "none"
    assert "no correction for model.embed_tokens.weight, lm_head.bias" in caplog.text
    caplog.clear()
    assert len(BiasCorrectedAdamW(zip(names, parameters, strict=True), exclude=()).param_groups) == 1
    assert not caplog.text
    BiasCorrectedAdamW(parameters)
    assert "parameters came without names" in caplog.text


def test_groups_keep_their_own_settings():
    steps = gradients_of(19, 3, 4, [(4,), (4,)])
    for s in steps:
        for microbatch in s:
            microbatch[1] = microbatch[0]
    parameters = parameters_of([(4,), (4,)])
    with torch.no_grad():
        parameters[1].copy_(parameters[0])
    groups = [
        {"params": [("a", parameters[0])], "cross_fit": "split", "lr": 0.05},
        {"params": [("b", parameters[1])], "cross_fit": "symmetric", "inverse_correction": "pre_ema"},
    ]
    optimizer = BiasCorrectedAdamW(groups, lr=0.1, eps=1e-3, weight_decay=0.1, warm_start=0)
    run(optimizer, parameters, steps)
    first = [[microbatch[:1] for microbatch in s] for s in steps]
    alone = [
        trained(first, {"cross_fit": "split"}, shapes=[(4,)], lr=0.05),
        trained(first, {"cross_fit": "symmetric", "inverse_correction": "pre_ema"}, shapes=[(4,)]),
    ]
    for p, expected in zip(parameters, alone, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_report():
    steps = gradients_of(20, 3, 8, [(50,)])
    p, q = parameters_of([(50,)]), parameters_of([(50,)])
    optimizer = make(p, inverse_correction="jackknife", folds="exact", report_freq=1, weight_decay=0.0)
    with pytest.raises(RuntimeError, match="no step has been recorded"):
        optimizer.correction_report()
    run(optimizer, p, steps[:2])
    plain = make(q, cross_fit="none", weight_decay=0.0)
    plain.load_state_dict(
        {"state": optimizer.state_dict()["state"], "param_groups": plain.state_dict()["param_groups"]}
    )
    with torch.no_grad():
        q[0].copy_(p[0])
    start, v = p[0].detach().clone(), optimizer.state[p[0]]["exp_avg_sq"].clone()
    run(optimizer, p, steps[2:])
    run(plain, q, steps[2:])
    u, standard = ((start - x[0].detach()) / 0.1 for x in (p, q))
    (report,) = optimizer.correction_report()
    assert report.step == 3 and report.cross_fit == "leave_one_out" and report.inverse_correction == "jackknife"
    assert report.relative == pytest.approx(float((u - standard).norm() / standard.norm()), rel=1e-9)
    assert report.cosine == pytest.approx(float(u @ standard / u.norm() / standard.norm()), rel=1e-9)
    g = torch.stack([microbatch[0] for microbatch in steps[2]])
    left_out = (g.sum(0) - g) / 7
    d = (v * 0.95 / (1 - 0.95**3) + left_out.square() * 0.05 / (1 - 0.95**3)).sqrt() + 1e-3
    jackknife = 7 / 8 * (d - d.mean(0)).square().sum(0)
    assert report.dispersion == pytest.approx(float((jackknife / d.square()).mean()), rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0; it must be a finite number >= 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"eps": float("inf")}, "eps=inf"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\); it must be two numbers in \[0, 1\)"),
        ({"cross_fit": "half"}, "cross_fit='half'; it must be one of 'none'"),
        ({"cross_fit": "none", "inverse_correction": "jackknife"}, "inverse_correction='jackknife'"),
        ({"cross_fit": "none", "folds": "skewed"}, "folds='skewed'; it must be one of"),
        ({"constants": "mine"}, "constants='mine'"),
        ({"alpha": 0.5}, r"alpha=0\.5.* needs cross_fit='split'"),
        ({"support_clip": 1.0}, r"support_clip=1\.0; it must be None unless"),
        ({"update_clip": 0.0}, r"update_clip=0\.0; it must be a finite number > 0 or None"),
        ({"warm_start": -1}, "warm_start=-1; it must be an integer >= 0"),
        ({"report_freq": -1}, "report_freq=-1"),
    ],
)
def test_bad_hyperparameters_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(parameters_of(SHAPES), **settings)


def test_default_warm_start_is_the_memory_of_the_second_moment():
    assert BiasCorrectedAdamW(parameters_of(SHAPES), betas=(0.9, 0.98)).param_groups[0]["warm_start"] == 50
    for form, steps in (("split", 20), ("symmetric", 20), ("none", 0)):
        assert make(parameters_of(SHAPES), cross_fit=form, warm_start=None).param_groups[0]["warm_start"] == steps
    assert BiasCorrectedAdamW(parameters_of(SHAPES), betas=(0.9, 0.9)).param_groups[0]["warm_start"] == 10
