"""Weights learned on an exact quadratic, whose best weights are known in closed form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from scipy.optimize import minimize

from lagless.checkpoints import CheckpointError, find_checkpoints
from lagless.lab.learn import (
    MODES,
    StreamedModel,
    conclusions,
    is_feasible,
    learn,
    schedule_in_words,
    split_documents,
)
from lagless.lab.recipes import load_recipe
from lagless.rules import UniformAverage

from .conftest import COUNT, SIZE, Quadratic, Vector


def fit(quadratic, run, modes=("free",), ridges=(0.0,), **options):
    options = {"model": Vector(), "targets_per_weight": 1, "loss": quadratic.loss, **options}
    return learn(run, quadratic.documents, modes=modes, ridges=ridges, **options)


def objective(quadratic, found, weights, ridge=0.0):
    return quadratic.value(weights, found.parts.fit) + 0.5 * ridge * float(((weights - found.prior) ** 2).sum())


def closed_form(quadratic, found, ridge):
    """The minimum of the mean loss + ½ ridge |w - prior|² under Σ w = 1, by Lagrange's equations."""
    centre = np.mean([document.items[0] for document in found.parts.fit.documents], axis=0)
    hessian = quadratic.points @ quadratic.hessian @ quadratic.points.T + ridge * np.eye(COUNT)
    linear = quadratic.points @ quadratic.hessian @ centre + ridge * found.prior
    system = np.block([[hessian, np.ones((COUNT, 1))], [np.ones((1, COUNT)), np.zeros((1, 1))]])
    return np.linalg.solve(system, np.append(linear, 1.0))[:COUNT]


def least_convex(quadratic, found, first):
    """The minimum over w ≥ 0, Σ w = 1, with nothing before ``first``, by a general method."""

    def full(free):
        return np.concatenate([np.zeros(first), free])

    count = COUNT - first
    solved = minimize(
        lambda free: objective(quadratic, found, full(free)),
        np.full(count, 1.0 / count),
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda free: free.sum() - 1.0},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return solved.fun


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_weights_are_those_of_the_closed_form(quadratic, vector_run, ridge):
    found = fit(quadratic, vector_run, ridges=(ridge,))
    best = objective(quadratic, found, closed_form(quadratic, found, ridge), ridge)
    least = min(objective(quadratic, found, e.weights, ridge) for e in found.evaluations)
    assert len(found.evaluations) <= 12
    assert -1e-9 < least - best < 1e-5 < 0.01 * (objective(quadratic, found, found.prior) - best)
    for e in found.evaluations:
        assert e.fit == pytest.approx(quadratic.value(e.weights, found.parts.fit), rel=1e-5)
        assert e.choose == pytest.approx(quadratic.value(e.weights, found.parts.choose), rel=1e-5)


@pytest.mark.parametrize("mode, first", [("convex", 0), ("decay", 1)])
def test_constrained_weights_are_those_of_a_general_method(quadratic, vector_run, mode, first):
    found = fit(quadratic, vector_run, modes=(mode,))
    mine = [e for e in found.evaluations if e.setting is not None]
    assert all(is_feasible(e.weights, mode) for e in mine)
    assert all((e.weights >= -1e-12).all() and e.weights[:first].tolist() == [0.0] * first for e in mine)
    assert min(e.fit for e in mine) == pytest.approx(least_convex(quadratic, found, first), abs=2e-5)


def test_evaluations_keep_to_the_mode_of_their_setting(quadratic, vector_run):
    found = fit(quadratic, vector_run, modes=MODES, ridges=(0.001, 0.1))
    settings = {e.setting for e in found.evaluations if e.setting is not None}
    assert len(settings) > 1
    assert all(e.setting is None or is_feasible(e.weights, e.setting.mode) for e in found.evaluations)
    assert all(abs(e.weights.sum() - 1.0) < 1e-12 for e in found.evaluations)
    assert min(e.choose for e in found.evaluations) == next(
        e.choose for e in found.evaluations if e.weights is found.weights
    )


def test_slopes_are_those_of_finite_differences(quadratic, vector_run):
    checkpoints = find_checkpoints(vector_run).checkpoints
    model = StreamedModel(Vector().double(), checkpoints)
    part = split_documents(quadratic.documents).fit
    items = [document.items[0] for document in part.documents]
    weights = np.array([0.4, -0.2, 0.1, 0.3, 0.2, 0.1, 0.1])

    def value(w):
        model.load(w)
        return float(quadratic.loss(model.model, items).mean().detach())

    model.load(weights)
    quadratic.loss(model.model, items).mean().backward()
    slopes, gram, _ = model.slopes([model.take_gradient()], gram=True)
    for i in range(COUNT):
        move = np.eye(COUNT)[i] - np.eye(COUNT)[-1]
        difference = (value(weights + 1e-2 * move) - value(weights - 1e-2 * move)) / 2e-2
        assert slopes[0, i] == pytest.approx(difference, rel=1e-4, abs=1e-4)
    moves = quadratic.points - quadratic.points[-1]
    np.testing.assert_allclose(gram, moves @ moves.T, rtol=1e-5, atol=1e-5)


def test_the_report_is_paired_by_document_and_on_documents_of_its_own(quadratic, vector_run):
    found = fit(quadratic, vector_run)
    parts = found.parts
    names = [{d.content for d in part.documents} for part in (parts.fit, parts.choose, parts.report)]
    assert set.union(*names) == {d.content for d in quadratic.documents} and sum(map(len, names)) == 40
    assert [c.role for c in found.comparisons] == ["live", "best checkpoint", "best rule", "best decay", "prior"]
    centres = np.array([d.items[0] for d in parts.report.documents])
    each = [
        0.5 * np.einsum("di,ij,dj->d", m, quadratic.hessian, m)
        for m in (found.weights @ quadratic.points - centres, quadratic.points[-1] - centres)
    ]
    live = found.comparisons[0]
    moved = each[0] - each[1]
    assert live.difference.value == pytest.approx(moved.mean(), rel=1e-4)
    assert live.difference.standard_error == pytest.approx(moved.std(ddof=1) / np.sqrt(len(moved)), rel=1e-4)
    assert live.difference.n == len(parts.report.documents)
    assert found.comparisons[1].name == f"checkpoint-{10 * int(np.argmax(found.comparisons[1].weights))}"


def test_files_are_read_twice_for_an_evaluation(quadratic, vector_run):
    found = fit(quadratic, vector_run, prior=UniformAverage())
    assert found.reads[0] == pytest.approx(2 * len(found.evaluations))


def test_what_was_random_shows_no_gain_on_the_part_that_reports(tmp_path):
    """Every checkpoint is as good as the others: what is learned is the chance in the documents that fit."""
    gains, errors, overfit = [], [], []
    for seed in range(4):
        quadratic = Quadratic(spread=3.0, seed=seed)
        run = quadratic.save(tmp_path / str(seed))
        centre = quadratic.points.mean(axis=0)  # the prior's own place: nothing is to be gained
        shifted = quadratic.centres - quadratic.centre + centre
        quadratic.documents = [
            type(d)(d.content, (tuple(c),)) for d, c in zip(quadratic.documents, shifted, strict=True)
        ]
        found = fit(quadratic, run, modes=MODES, ridges=(0.01, 1.0), prior=UniformAverage())
        against = found.comparisons[-1]
        assert against.role == "prior"
        gains.append(against.difference.value)
        errors.append(against.difference.standard_error)
        fitted = min(found.evaluations, key=lambda e: e.fit).weights
        overfit.append(quadratic.value(fitted, found.parts.report) - quadratic.value(found.prior, found.parts.report))
        assert quadratic.value(fitted, found.parts.fit) < quadratic.value(found.prior, found.parts.fit) - 0.05
    # z-bound 2: neither a gain nor a loss beyond the error, where what fits best would have lost more
    error = np.sqrt(np.mean(np.square(errors)) / len(gains))
    assert abs(np.mean(gains)) < 2.0 * error < np.mean(overfit)


def test_parts_with_a_document_in_common_are_refused(quadratic):
    parts = split_documents(quadratic.documents)
    with pytest.raises(ValueError, match="is in more than one part"):
        replace(parts, report=parts.fit)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [3, 19, 26])
def test_a_search_that_was_stopped_goes_on_bit_for_bit(quadratic, vector_run, tmp_path, after):
    whole = fit(quadratic, vector_run, modes=MODES, ridges=(0.01, 0.1))
    calls, state = [], tmp_path / "state.json"

    def stopping(what, best):
        calls.append(what)
        if len(calls) == after:
            raise Stop

    options = {"modes": MODES, "ridges": (0.01, 0.1), "state": state}
    with pytest.raises(Stop):
        fit(quadratic, vector_run, progress=stopping, **options)
    assert not list(tmp_path.glob(".*partial"))
    resumed = fit(quadratic, vector_run, **options)
    assert resumed.weights.tolist() == whole.weights.tolist()
    assert resumed.record() == whole.record()
    assert [e.fit_slopes.tolist() for e in resumed.evaluations] == [e.fit_slopes.tolist() for e in whole.evaluations]
    assert resumed.reads == whole.reads


def test_a_state_of_another_search_is_refused(quadratic, vector_run, tmp_path):
    state = tmp_path / "state.json"
    fit(quadratic, vector_run, state=state)
    with pytest.raises(ValueError, match="of another search: its ridges is \\[0.0\\], and \\[0.5\\] here"):
        fit(quadratic, vector_run, ridges=(0.5,), state=state)
    with pytest.raises(ValueError, match="of another search: its data is"):
        fit(quadratic, vector_run, seed=1, state=state)
    state.write_text("{")
    with pytest.raises(ValueError, match="no state of a search"):
        fit(quadratic, vector_run, state=state)


def test_too_few_targets_are_refused(quadratic, vector_run):
    with pytest.raises(ValueError, match=r"20 targets to fit 6 free weights on, 3 for each; at least 4 are needed"):
        fit(quadratic, vector_run, targets_per_weight=4)


def test_two_checkpoints_are_too_few(quadratic, vector_run):
    with pytest.raises(ValueError, match="2 checkpoints .*3 or more"):
        fit(quadratic, find_checkpoints(vector_run, steps=[0, 10]))


def test_copies_are_named(quadratic, tmp_path):
    quadratic.points[4] = quadratic.points[2]
    with pytest.raises(CheckpointError, match="checkpoint-20 and checkpoint-40 hold the same weights"):
        fit(quadratic, quadratic.save(tmp_path / "run"))


def test_a_checkpoint_at_which_the_loss_is_not_finite_is_named(quadratic, tmp_path):
    quadratic.points[3] *= 1e30
    run = quadratic.save(tmp_path / "run")

    def overflowing(model, items):
        return quadratic.loss(model, items).float().square()

    with pytest.raises(ValueError, match=r"not finite at checkpoint-30 \(inf\)"):
        fit(quadratic, run, loss=overflowing)


def test_a_model_of_another_shape_is_refused(quadratic, vector_run):
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Parameter(torch.zeros(SIZE - 4))

    with pytest.raises(CheckpointError, match="'second' is only in the checkpoints"):
        fit(quadratic, vector_run, model=Other())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"modes": ("best",)}, "modes="),
        ({"modes": ()}, "modes="),
        ({"ridges": (-1.0,)}, "ridges="),
        ({"ridges": (float("nan"),)}, "ridges="),
        ({"evaluations": 1}, "evaluations=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"loss": lambda model, items: torch.zeros(())}, "must return shape"),
    ],
)
def test_bad_arguments_are_refused(quadratic, vector_run, options, message):
    with pytest.raises(ValueError, match=message):
        fit(quadratic, vector_run, **options)


def test_memory_that_runs_out_says_what_to_lower_and_keeps_what_was_measured(quadratic, vector_run, tmp_path):
    calls, state = [], tmp_path / "state.json"

    def loss(model, items):
        calls.append(len(items))
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory is left")
        return quadratic.loss(model, items)

    with pytest.raises(ValueError, match=r"batch_size=8 \(no memory is left\). Lower batch_size"):
        fit(quadratic, vector_run, loss=loss, state=state)
    assert "choose: checkpoint-30" in state.read_text() and 'checkpoint-40": {' not in state.read_text()


def test_documents_that_the_run_was_trained_on_are_refused(quadratic, vector_run, tmp_path):
    texts = ["document 3", "another text", "document 5"]
    (tmp_path / "books.txt").write_text("<|endoftext|>".join(texts * 20))
    recipe = load_recipe("pace-pretrain-small", [f"data.path={tmp_path / 'books.txt'}"])
    (vector_run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    with pytest.raises(ValueError, match="2 of 40 documents are among those the run was trained on"):
        fit(quadratic, vector_run)


def test_weights_on_the_edge_of_the_trust_region_are_reported(quadratic, vector_run):
    found = fit(quadratic, vector_run, evaluations=2)
    assert found.on_edge == found.evaluations[-1].on_edge and len(found.evaluations) == 2
    assert ("edge of the trust region" in " ".join(conclusions(found))) == found.on_edge
    assert found.on_edge, "one step does not reach the minimum here"
    assert not fit(quadratic, vector_run).on_edge


def test_the_schedule_in_words(quadratic, vector_run):
    found = replace(fit(quadratic, vector_run), weights=np.array([0, 0, 0, 0.25, 0.25, 0.25, 0.25]))
    below = "below 90% for the last 50% of the run, 50% for the last 17% of the run"
    assert schedule_in_words(found) == f"between 0.25 and 1.00 of the rate that was used; {below}"
