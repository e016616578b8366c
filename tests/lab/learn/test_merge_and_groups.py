"""Weights on models of several runs, in groups of tensors, and decays of the learned shape, on an exact quadratic."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lagless import trajectory_weights
from lagless.checkpoints import CheckpointError, find_checkpoints, find_models
from lagless.lab.learn import StreamedModel, conclusions, is_feasible, learn
from lagless.rules import DecayAverage

from .conftest import COUNT, SIZE, Vector

GROUPS = {"first": "first"}


def fit(quadratic, run, modes=("free",), ridges=(0.0,), **options):
    options = {"model": Vector(), "targets_per_weight": 1, "loss": quadratic.loss, **options}
    return learn(run, quadratic.documents, modes=modes, ridges=ridges, **options)


@pytest.fixture
def models(vector_run):
    return find_models([vector_run / f"checkpoint-{10 * i}" for i in range(COUNT)])


def value(quadratic, columns, weights, part):
    """The mean loss over a part where Σ_k weights_k columns_k is the point."""
    moved = weights @ columns - np.array([document.items[0] for document in part.documents])
    return float(1.0 + 0.5 * ((moved @ quadratic.hessian) * moved).sum(axis=1).mean())


def columns_of(points, groups):
    """Each point once for each group, zero outside of it."""
    if not groups:
        return points
    masks = np.arange(SIZE) < SIZE - 4
    return np.concatenate([points * mask for mask in (masks, ~masks)])


def best(quadratic, found, columns, mode):
    """The minimum under Σ w = 1 in each group, by a general method."""
    count = COUNT
    groups = len(columns) // count
    first = mode == "decay"
    bounds = [
        (None, None) if mode == "free" else (0.0, 0.0 if first and i % count == 0 else 1.0) for i in range(len(columns))
    ]
    sums = [{"type": "eq", "fun": lambda w, g=g: w[g * count : (g + 1) * count].sum() - 1.0} for g in range(groups)]
    centre = np.mean([document.items[0] for document in found.parts.fit.documents], axis=0)
    return minimize(
        lambda w: value(quadratic, columns, w, found.parts.fit),
        np.full(len(columns), 1.0 / count),
        jac=lambda w: columns @ quadratic.hessian @ (w @ columns - centre),
        method="SLSQP",
        bounds=bounds,
        constraints=sums,
        options={"ftol": 1e-14, "maxiter": 1000},
    ).fun


@pytest.mark.parametrize("mode", ["free", "convex"])
def test_models_of_several_runs_are_learned_like_checkpoints(quadratic, models, mode):
    found = fit(quadratic, models, modes=(mode,))
    least = min(e.fit for e in found.evaluations)
    assert least == pytest.approx(best(quadratic, found, quadratic.points, mode), abs=2e-5)
    assert found.steps is None and found.names == models.names and found.decays == ()
    np.testing.assert_allclose(found.prior, 1.0 / COUNT)
    assert [c.role for c in found.comparisons] == ["best checkpoint", "prior"]
    assert "against best checkpoint" in next(iter(conclusions(found)))


def test_two_models_are_enough_and_their_order_means_nothing(quadratic, vector_run):
    one, two = vector_run / "checkpoint-30", vector_run / "checkpoint-50"
    there, back = (fit(quadratic, find_models(pair)) for pair in ([one, two], [two, one]))
    np.testing.assert_allclose(there.weights, back.weights[::-1], atol=1e-4)
    assert there.loss.value == pytest.approx(back.loss.value, abs=1e-5)


def test_what_needs_an_order_is_refused_for_models(quadratic, models, vector_run):
    with pytest.raises(ValueError, match="'decay' leaves nothing on θ_0"):
        fit(quadratic, models, modes=("decay",))
    with pytest.raises(ValueError, match="have no order"):
        fit(quadratic, models, prior=DecayAverage(total_steps=60))
    assert {e.setting.mode for e in fit(quadratic, models, modes=None).evaluations[1:]} <= {"free", "convex"}
    copies = replace(models, checkpoints=(models.checkpoints[0], *models.checkpoints[:1], models.checkpoints[2]))
    with pytest.raises(CheckpointError, match="hold the same weights"):
        fit(quadratic, replace(copies, names=("a", "b", "c")))


@pytest.mark.parametrize("mode", ["free", "convex", "decay"])
def test_groups_reach_the_minimum_of_all_their_weights(quadratic, vector_run, mode):
    found = fit(quadratic, vector_run, modes=(mode,), groups=GROUPS, evaluations=24)
    columns = columns_of(quadratic.points, GROUPS)
    mine = [e for e in found.evaluations if e.setting is not None]
    assert all(is_feasible(e.weights, mode, 2) for e in mine) and found.weights.shape == (2 * COUNT,)
    for e in found.evaluations:
        assert e.fit == pytest.approx(value(quadratic, columns, e.weights, found.parts.fit), rel=1e-5)
    start = found.evaluations[0].fit
    least, floor = min(e.fit for e in found.evaluations), best(quadratic, found, columns, mode)
    assert -1e-6 < least - floor < 1e-4 < 0.01 * (start - floor)
    one = best(quadratic, found, quadratic.points, mode)
    assert least < one - 1e-3, "weights of their own do better than common ones"
    assert list(found.by_group) == ["first", "rest"] and found.decays == ()
    np.testing.assert_allclose([row.sum() for row in found.by_group.values()], 1.0)


def test_one_group_of_everything_is_no_group_at_all(quadratic, vector_run):
    plain, grouped = fit(quadratic, vector_run), fit(quadratic, vector_run, groups={"all": ""})
    assert plain.weights.tolist() == grouped.weights.tolist() and grouped.group_names == ("all",)


def test_slopes_and_moves_of_groups_are_their_own(quadratic, vector_run):
    model = StreamedModel(Vector().double(), find_checkpoints(vector_run).checkpoints, groups=GROUPS)
    items = [document.items[0] for document in quadratic.documents[:5]]
    generator = np.random.default_rng(0)
    weights = np.concatenate([generator.dirichlet(np.ones(COUNT)) for _ in range(2)])

    def loss_at(w):
        model.load(w)
        return quadratic.loss(model.model, items).mean()

    loss_at(weights).backward()
    slopes, gram, _ = model.slopes([model.take_gradient()], gram=True)
    for k in range(2 * COUNT):
        move = np.eye(2 * COUNT)[k] - np.eye(2 * COUNT)[COUNT * (k // COUNT) + COUNT - 1]
        with torch.no_grad():
            difference = float(loss_at(weights + 1e-2 * move) - loss_at(weights - 1e-2 * move)) / 2e-2
        assert slopes[0, k] == pytest.approx(difference, rel=1e-4, abs=1e-4)
    moves = columns_of(quadratic.points - quadratic.points[-1], GROUPS)
    np.testing.assert_allclose(gram, moves @ moves.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups, message", [({"x": "nothing"}, "finds no tensor"), ({"x": "["}, "regular expression")])
def test_bad_groups_are_refused(quadratic, vector_run, groups, message):
    with pytest.raises(ValueError, match=message):
        fit(quadratic, vector_run, groups=groups)


def test_more_groups_need_more_targets(quadratic, vector_run):
    with pytest.raises(ValueError, match="to fit 12 free weights on"):
        fit(quadratic, vector_run, groups=GROUPS, targets_per_weight=4)


def test_decays_of_the_learned_shape_are_those_averages(quadratic, vector_run):
    found = fit(quadratic, vector_run, modes=("decay",))
    assert [c.name for c in found.decays] == [f"the learned shape over the last {p}%" for p in (10, 20, 40, 80)]
    for c in found.decays:
        assert c.loss.value == pytest.approx(quadratic.value(c.weights, found.parts.report), rel=1e-5)
        assert is_feasible(c.weights, "decay")
    assert found.decays[0].weights[-1] == pytest.approx(1.0), "10 % of 60 steps is one checkpoint"
    roles = {c.role: c for c in found.comparisons}
    assert " decay over the last " in roles["best decay"].name


@pytest.mark.parametrize("share, shape", [(0.5, "linear"), (1.0, "minus-sqrt"), (0.4, (1.0, 0.3, 0.3))])
def test_the_shape_of_a_decay_stretched_to_its_own_length_is_that_decay(share, shape):
    from lagless.lab.learn._baselines import decay_over, shape_of

    steps = list(range(0, 41))
    weights = trajectory_weights(decay_over(shape, share, steps), steps)
    begin = int(np.flatnonzero(np.cumsum(weights[::-1])[::-1] >= 0.99)[-1]) - 1
    again = trajectory_weights(decay_over(shape_of(weights, steps), 1.0 - begin / 40, steps), steps)
    np.testing.assert_allclose(np.cumsum(again), np.cumsum(weights), atol=0.03)
