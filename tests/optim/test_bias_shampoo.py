"""Shampoo: pure update against published numbers, and the optimizer."""

import json
import math
from pathlib import Path

import pytest
import torch

from lagless.optim import BiasCorrectedShampoo
from lagless.testing._optimizers import OPTIMIZER_CHECKS
from lagless.updates import Spread, eigenbasis, energies, inverse_fourth_root

VECTORS = json.loads(Path(__file__).with_name("bias_correction_vectors.json").read_text())
INPUTS = VECTORS["inputs"]["shampoo"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["std", "cf", "inv", "full"])
def test_published_numbers(name, dtype):
    hyper, tolerance = INPUTS["hyper"], 1e-9 if dtype == torch.float64 else 1e-6
    w = torch.tensor(INPUTS["w0"], dtype=dtype)
    m, factors, roots = torch.zeros_like(w), [torch.zeros_like(w) for _ in range(2)], []
    for step, (gradients, root) in enumerate(zip(INPUTS["grads"], INPUTS["root_steps"], strict=True)):
        g = torch.tensor(gradients, dtype=dtype)
        top, below = (g[:2], g[2:]) if name in ("cf", "full") else (g, g)
        m = hyper["b1"] * m + (1 - hyper["b1"]) * top.mean(0)
        printed = VECTORS["outputs"][f"shampoo_{name}"][step]
        if root:
            roots = []
            for side, (factor, letter) in enumerate(zip(factors, "LR", strict=True)):
                sided = below if side == 0 else below.mT
                inner = sided if name in ("cf", "full") else sided.mean(0, keepdim=True)
                factor.lerp_((inner @ inner.mT).mean(0), 1 - hyper["b2"])
                basis = eigenbasis(factor, hyper["damp"])
                samples = energies(sided, basis.vectors)
                variance = (1 - hyper["b2"]) ** 2 * Spread(samples, len(sided)).variance_of_mean(samples)
                torch.testing.assert_close(
                    basis.values,
                    torch.tensor(printed[f"lam{letter}"], dtype=dtype),
                    rtol=10 * tolerance,
                    atol=tolerance,
                )
                roots.append(inverse_fourth_root(basis, variance if name in ("inv", "full") else None))
        update = roots[0] @ m @ roots[1]
        w = w * (1 - hyper["lr"] * hyper["wd"]) - hyper["lr"] * update
        for found, key in ((w, "p"), (update, "U")):
            expected = torch.tensor(printed[key], dtype=dtype).view(2, 2)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


FORMS = {
    "std": {"cross_fit": "none"},
    "cf": {"cross_fit": "split"},
    "inv": {"cross_fit": "none", "inverse_correction": "post_ema", "folds": "exact"},
    "full": {"cross_fit": "split", "inverse_correction": "pre_ema", "folds": "exact"},
    "lagged": {"cross_fit": "split", "inverse_correction": "post_ema"},
}


def make(parameters, **settings):
    return BiasCorrectedShampoo(
        [(f"p{i}", p) for i, p in enumerate(parameters)],
        **{"lr": 0.1, "weight_decay": 0.1, "damping": 1e-3, "grafting": "none"} | settings,
    )


def run(optimizer, parameters, steps):
    for microbatches in steps:
        optimizer.zero_grad()
        for gradients in microbatches:
            (
                sum((p * g.to(p.dtype)).sum() for p, g in zip(parameters, gradients, strict=True)) / len(microbatches)
            ).backward()
        optimizer.step()


def steps_of(shapes, steps=4, microbatches=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3  # noqa: E731
    return [[[draw(shape) for shape in shapes] for _ in range(microbatches)] for _ in range(steps)]


def parameters_of(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("name", ["std", "cf", "inv", "full"])
def test_optimizer_reproduces_published_parameters(name):
    w = torch.tensor(INPUTS["w0"], dtype=torch.float64, requires_grad=True)
    optimizer = make([w], root_freq=2, **FORMS[name])
    for step, gradients in enumerate(INPUTS["grads"]):
        run(optimizer, [w], [[[torch.tensor(gradients[j], dtype=torch.float64)] for j in (0, 2, 1, 3)]])
        expected = torch.tensor(VECTORS["outputs"][f"shampoo_{name}"][step]["p"], dtype=torch.float64).view(2, 2)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-9)


def test_the_variance_of_inv_and_full_counts():
    """Unlike in the authors' variants in which it is dropped, or applied where it was not asked for."""
    moved = {}
    for name, form in FORMS.items():
        parameters = parameters_of([(4, 3)])
        run(make(parameters, root_freq=2, **form), parameters, steps_of([(4, 3)]))
        moved[name] = parameters[0].detach()
    assert not torch.allclose(moved["cf"], moved["full"]) and not torch.allclose(moved["std"], moved["inv"])


def test_lagged_variance_is_exact_where_the_eigenvectors_stay():
    """Microbatches that are multiples of one matrix, then of one with the same singular vectors in another order."""

    def orthogonal(seed):
        drawn = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return torch.linalg.qr(drawn)[0]

    bases = [
        orthogonal(1) @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ orthogonal(2)
        for values in ((2.0, 1.0, 0.5, 0.25), (0.5, 5.0, 80.0, 20.0), (9.0, 3.0, 1.0, 200.0))
    ]
    sizes = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    steps = [[[size * base] for size in row] for base, row in zip(bases, sizes, strict=True)]
    moved = []
    for folds in ("lagged", "exact"):
        parameters = parameters_of([(4, 4)])
        form = {"cross_fit": "none", "inverse_correction": "post_ema", "folds": folds}
        optimizer = make(parameters, root_freq=1, **form)
        run(optimizer, parameters, steps[:1])
        with torch.no_grad():
            parameters[0].copy_(parameters_of([(4, 4)])[0])  # at the first roots only the exact form has a variance
        run(optimizer, parameters, steps[1:])
        moved.append(parameters[0].detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-9, atol=1e-9)


def test_blocks_are_matrices_of_their_own():
    shapes = [(4, 6)]
    steps = steps_of(shapes)
    whole = parameters_of(shapes)
    parts = [whole[0].detach()[:, :3].clone().requires_grad_(), whole[0].detach()[:, 3:].clone().requires_grad_()]
    run(make(whole, block_size=4, **FORMS["lagged"], root_freq=2), whole, steps)
    halves = [[[g[:, :3], g[:, 3:]] for (g,) in microbatches] for microbatches in steps]
    run(make(parts, block_size=4, **FORMS["lagged"], root_freq=2), parts, halves)
    torch.testing.assert_close(whole[0].detach(), torch.cat(parts, dim=1).detach(), rtol=1e-12, atol=1e-12)


def test_what_is_no_matrix_is_stepped_with_adamw():
    shapes = [(3, 4), (5,), (1, 4), ()]
    steps = steps_of(shapes)
    parameters, plain = parameters_of(shapes), parameters_of(shapes)[1:]
    run(make(parameters, adamw_eps=1e-3), parameters, steps)
    adamw = torch.optim.AdamW(plain, lr=0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)
    run(adamw, plain, [[microbatch[1:] for microbatch in microbatches] for microbatches in steps])
    for p, q in zip(parameters[1:], plain, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)


def test_grafting_gives_the_norm_of_adamw():
    """Of the first step, where AdamW's update is that of the same gradient whatever its betas."""
    steps = steps_of([(4, 3)], steps=1)
    found, plain = parameters_of([(4, 3)]), parameters_of([(4, 3)])
    start = found[0].detach().clone()
    run(make(found, grafting="adamw", cross_fit="none", weight_decay=0.0), found, steps)
    run(torch.optim.AdamW(plain, lr=0.1, weight_decay=0.0), plain, steps)
    lengths = [float((p[0].detach() - start).norm()) for p in (found, plain)]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-7)
    assert not torch.allclose(found[0], plain[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_resumed_equals_never_stopped(name, dtype, tmp_path):
    shapes = [(4, 3), (5,)]
    steps = steps_of(shapes, steps=6)
    for stop in (1, 2, 3):
        parameters = parameters_of(shapes, dtype)
        optimizer = make(parameters, root_freq=2, **FORMS[name])
        run(optimizer, parameters, steps[:stop])
        torch.save([optimizer.state_dict(), parameters], tmp_path / "state.pt")
        run(optimizer, parameters, steps[stop:])
        state, resumed = torch.load(tmp_path / "state.pt", weights_only=True)
        another = make(resumed, root_freq=2, **FORMS[name])
        another.load_state_dict(state)
        run(another, resumed, steps[stop:])
        assert all(torch.equal(p, q) for p, q in zip(parameters, resumed, strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_memory_is_known_beforehand(name):
    parameters = parameters_of([(40, 30), (5,)])
    optimizer = make(parameters, root_freq=1, grafting="adamw", block_size=16, **FORMS[name])
    promised = optimizer.state_bytes()
    run(optimizer, parameters, steps_of([(40, 30), (5,)], steps=2))
    held = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    assert promised == sum(t.numel() * t.element_size() for t in held)


def test_report_and_clips():
    parameters = parameters_of([(4, 3)])
    optimizer = make(parameters, root_freq=2, norm_clip=1e-3, largest_root=2.0, **FORMS["full"])
    start = parameters[0].detach().clone()
    run(optimizer, parameters, steps_of([(4, 3)], steps=1))
    moved = parameters[0].detach() - start * (1 - 0.01)
    assert float(moved.norm()) == pytest.approx(1e-4, rel=1e-9)
    (report,) = optimizer.correction_report()
    assert report.step == 1 and 0.0 < report.relative


def test_reported_dispersion():
    """The mean of V/λ² over the eigenvalues of both factors, written out."""
    parameters = parameters_of([(4, 3)])
    optimizer = make(parameters, damping=1e-2, **FORMS["full"])
    (drawn,) = steps_of([(4, 3)], steps=1)
    run(optimizer, parameters, [drawn])
    second, ratios = [g for (g,) in drawn][1::2], []
    for sided in (second, [g.T for g in second]):
        b2 = optimizer.param_groups[0]["betas"][1]
        basis = eigenbasis((1 - b2) * sum(g @ g.T for g in sided) / len(sided), 1e-2)
        samples = torch.stack([energies(g, basis.vectors) for g in sided])
        ratios.append((1 - b2) ** 2 * samples.var(dim=0) / len(sided) / basis.values**2)
    (report,) = optimizer.correction_report()
    assert report.dispersion == pytest.approx(float(torch.cat(ratios).mean()), rel=1e-9)
    lagged = make(parameters, damping=1e-2, **FORMS["full"] | {"folds": "lagged"})
    lagged.zero_grad()
    run(lagged, parameters, [drawn])
    assert math.isnan(lagged.correction_report()[0].dispersion)  # no former eigenvectors to measure along


def test_embeddings_are_adamw_and_that_is_said(caplog):
    parameters = parameters_of([(7, 3), (3, 3)])
    optimizer = BiasCorrectedShampoo(zip(["embed_tokens.weight", "up.weight"], parameters, strict=True))
    assert "AdamW for embed_tokens.weight" in caplog.text
    assert [group["block_size"] for group in optimizer.param_groups] == [1024, 0]


@pytest.mark.parametrize("check", OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check):
    check(lambda params: BiasCorrectedShampoo(params, lr=0.01, root_freq=2, cross_fit="none"))


@pytest.mark.parametrize("check", OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
def test_conformance_with_microbatches(check):
    settings = {"lr": 0.01, "root_freq": 2, "inverse_correction": "post_ema"}
    check(lambda params: BiasCorrectedShampoo(params, **settings), microbatches=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, r"damping=0\.0; it must be a finite number > 0"),
        ({"cross_fit": "symmetric"}, "cross_fit='symmetric'; it must be 'none' or 'split': the method has no other"),
        ({"grafting": "sgd"}, "grafting='sgd'"),
        ({"root_freq": 0}, "root_freq=0"),
        ({"adamw_betas": (0.9, 1.0)}, "adamw_betas="),
    ],
)
def test_bad_hyperparameters_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(parameters_of([(4, 3)]), **settings)


def test_report_where_a_matrix_missed_a_gradient():
    parameters = parameters_of([(3, 3), (3, 3)])
    optimizer = make(parameters, root_freq=2, report_freq=1)
    for number, microbatches in enumerate(steps_of([(3, 3), (3, 3)], steps=5)):
        optimizer.zero_grad()
        for a, b in microbatches:
            loss = (parameters[0] * a).sum()
            (loss if number == 1 else loss + (parameters[1] * b).sum()).backward()
        optimizer.step()
    (report,) = optimizer.correction_report()
    assert report.step == 5 and 0.0 < report.relative


@pytest.mark.parametrize("half", [0, 1])
def test_a_gradient_in_one_half_only_gives_a_standard_step(half):
    parameters, plain = parameters_of([(3, 3), (3, 3)]), parameters_of([(3, 3), (3, 3)])
    (drawn,) = steps_of([(3, 3), (3, 3)], steps=1)
    for found, form in ((parameters, "split"), (plain, "none")):
        optimizer = make(found, cross_fit=form)
        for j, (a, b) in enumerate(drawn):
            loss = (found[0] * a).sum()
            (loss + (found[1] * b).sum() if j % 2 == half else loss).backward()
        optimizer.step()
    torch.testing.assert_close(parameters[1].detach(), plain[1].detach(), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(parameters[0], plain[0])
