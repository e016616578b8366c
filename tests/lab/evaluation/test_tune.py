"""Tuning by gradients in the weights on checkpoints."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lagless import BEMA, DEMA, EMA, PowerEMA, UniformAverage, trajectory_weights
from lagless.checkpoints import find_checkpoints
from lagless.lab.averages import evaluate_averages
from lagless.lab.evaluation import held_out_sequences, sequence_losses
from lagless.lab.tune import (
    SEARCH_RANGES,
    AverageLoss,
    QuadraticModel,
    TrustRegion,
    at_edge,
    rules_searched,
    tune,
)
from lagless.posthoc import combine_checkpoints

STARTS = {"bema": BEMA.paper(update_freq=10), "ema": EMA(update_freq=10)}


@pytest.fixture
def held_out(text, tokenizer):
    return tuple(held_out_sequences(str(path), tokenizer, length=48, count=16) for path in text)


@pytest.fixture
def average_loss(run, held_out):
    checkpoints = find_checkpoints(run).checkpoints
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint-60", dtype=torch.float64)
    states = combine_checkpoints(checkpoints, np.eye(len(checkpoints)), accumulate="float64")
    return AverageLoss(model, states, held_out[0], batch_size=5)


def test_one_backward_pass_gives_the_slope_in_every_weight(average_loss):
    weights = np.array([0.1, -0.1, 0.1, 0.2, 0.2, 0.2, 0.3])
    _, slopes = average_loss(weights)
    for i in range(len(weights)):
        step = 1e-4 * np.eye(len(weights))[i]
        difference = (average_loss(weights + step)[0] - average_loss(weights - step)[0]) / 2e-4
        # logits are float32 in the loss, so differences are good to about 1e-7 / 1e-4
        assert slopes[i] == pytest.approx(difference, rel=1e-2, abs=2e-3)


def test_tied_tensors_that_are_stored_twice_count_once(average_loss, run, held_out):
    states = [dict(state) for state in average_loss._states]
    for state in states:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    twice = AverageLoss(average_loss._model, states, held_out[0], batch_size=5)
    weights = np.eye(7)[3]
    np.testing.assert_allclose(twice(weights)[1], average_loss(weights)[1])
    np.testing.assert_allclose(twice.gram(), average_loss.gram())


def test_gram_is_of_the_moves_between_checkpoints(average_loss, run):
    states = combine_checkpoints(find_checkpoints(run).checkpoints, np.eye(7), accumulate="float64")
    moved = [torch.cat([(s[name] - states[-1][name]).flatten() for name in s]) for s in states]
    expected = [[float(a @ b) for a in moved] for b in moved]
    np.testing.assert_allclose(average_loss.gram(), expected, rtol=1e-5, atol=1e-9)


def test_the_model_of_a_quadratic_becomes_exact():
    generator = np.random.default_rng(0)
    thetas, root = generator.standard_normal((4, 6)), generator.standard_normal((6, 6))
    hessian, centre = root @ root.T + np.eye(6), generator.standard_normal(6)

    def loss(w):
        d = w @ thetas - centre
        return 0.5 * d @ hessian @ d, thetas @ (hessian @ d)

    moves = thetas - thetas[-1]
    model = QuadraticModel(moves @ moves.T)
    candidates = np.array([(a, b, c, 1 - a - b - c) for a, b, c in itertools.product(np.linspace(-1, 1, 21), repeat=3)])
    truth = np.array([loss(w)[0] for w in candidates])
    model.add(np.eye(4)[3], *loss(np.eye(4)[3]))
    for chosen in candidates[[100, 5000, 9000]]:  # as many steps as there are directions
        model.add(chosen, *loss(chosen))
    np.testing.assert_allclose(model.predict(candidates), truth, rtol=1e-6)


def test_it_finds_what_the_whole_grid_holds_best(run, held_out):
    validation, test = held_out
    found = tune(run, STARTS, validation, test, evaluations=12)
    rules = {str(i): rule for i, rule in enumerate(r for start in STARTS.values() for r in rules_searched(start))}
    assert found.considered == len({*rules.values(), *STARTS.values()}) > 1500
    some = dict(list(rules.items())[::7])
    grid = list(evaluate_averages(run, some, lambda m: sequence_losses(m, validation, 16).mean.value, live=False))
    best_of_grid = min(e.result for e in grid)
    best = min(trial.loss for trial in found.trials)
    start = min(trial.loss for trial in found.trials if trial.rule in STARTS.values())
    assert len(found.trials) <= 12 < len(grid)
    assert best <= best_of_grid + 0.05 * (start - best_of_grid)


def test_the_result_is_on_sequences_that_the_search_did_not_see(run, held_out):
    validation, test = held_out
    found = tune(run, STARTS, validation, test, evaluations=6)
    assert [c.name for c in found.candidates] == ["live", "bema", "ema", "best"]
    rules = {"bema": STARTS["bema"], "ema": STARTS["ema"], "best": found.best}
    for each in evaluate_averages(run, rules, lambda m: (sequence_losses(m, validation), sequence_losses(m, test))):
        candidate = next(c for c in found.candidates if c.name == each.name)
        assert candidate.validation == pytest.approx(each.result[0].mean.value, abs=1e-5)
        assert candidate.test.value == pytest.approx(each.result[1].mean.value, abs=1e-5)
    live, best = found.candidates[0], found.candidates[-1]
    assert best.difference.value == pytest.approx(best.test.value - live.test.value)
    assert live.difference.value == 0.0 and live.rule is None
    assert best.validation == min(t.loss for t in found.trials if t.rule is not None)
    swapped = tune(run, STARTS, validation, validation, evaluations=6)
    assert swapped.best == found.best


def test_evaluations_are_bounded(run, held_out):
    seen = []
    found = tune(run, STARTS, *held_out, evaluations=4, progress=seen.append)
    assert seen == list(found.trials) and len(seen) <= 4
    assert [trial.rule for trial in seen[:3]] == [None, *STARTS.values()]


def test_settings_keep_what_is_not_searched():
    found = list(rules_searched(BEMA.paper(update_freq=10, lag=3.0)))
    assert len(found) == SEARCH_RANGES["ema_power"].points * SEARCH_RANGES["bias_power"].points
    assert all(rule.lag == 3.0 and rule.update_freq == 10 for rule in found)
    assert len(list(rules_searched(BEMA.paper(bias_power=np.inf)))) == SEARCH_RANGES["ema_power"].points
    assert {rule.half_life_fraction is None for rule in rules_searched(EMA(half_life_fraction=0.1))} == {False}
    assert len({rule.relative_width for rule in rules_searched(PowerEMA())}) == SEARCH_RANGES["relative_width"].points
    assert list(rules_searched(UniformAverage())) == [UniformAverage()]
    assert list(rules_searched(EMA(decay=0.9))) == [EMA(decay=0.9)]
    assert len(list(rules_searched(DEMA.paper()))) == SEARCH_RANGES["ema_power"].points


def test_bad_requests_are_refused(run, held_out):
    with pytest.raises(ValueError, match="starts: the mapping is empty"):
        tune(run, {}, *held_out)
    with pytest.raises(ValueError, match="evaluations=2; it must be at least 3"):
        tune(run, STARTS, *held_out, evaluations=2)
    with pytest.raises(ValueError, match="updates every 400 steps"):
        tune(run, {"bema": BEMA.paper()}, *held_out)


def test_the_trust_region_follows_the_model():
    gram = np.diag([1.0, 4.0, 0.0])
    region = TrustRegion(gram, np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]))
    assert region.radius == pytest.approx(np.sqrt(2.0))
    far = np.array([[1.4, 0.0, -0.4], [1.5, 0.0, -0.5], [0.0, 0.7, 0.3], [0.0, 0.8, 0.2]])
    assert region.holds(far, np.array([0.0, 0.0, 1.0])).tolist() == [True, False, True, False]
    region.adapt(gained=0.5, promised=1.0)
    assert region.radius == pytest.approx(np.sqrt(2.0))
    region.adapt(gained=0.1, promised=1.0)
    assert region.radius == pytest.approx(np.sqrt(2.0) / 2)
    region.adapt(gained=0.9, promised=1.0)
    assert region.radius == pytest.approx(np.sqrt(2.0))


def test_what_is_evaluated_next_lies_in_the_trust_region(run, held_out):
    found = tune(run, {"ema": EMA(half_life_fraction=0.02)}, *held_out, evaluations=3)
    steps = find_checkpoints(run).steps
    weights = np.array([trajectory_weights(t.rule, steps) if t.rule else np.eye(7)[-1] for t in found.trials])
    states = combine_checkpoints(find_checkpoints(run).checkpoints, np.eye(7), accumulate="float64")
    flat = torch.stack([torch.cat([s[name].flatten() for name in s]) for s in states]).numpy()
    between = np.linalg.norm(weights[1] @ flat - weights[0] @ flat)
    best = min(range(2), key=lambda i: found.trials[i].loss)
    assert len(found.trials) == 3
    assert np.linalg.norm((weights[2] - weights[best]) @ flat) <= 1.001 * between
    assert found.beyond > 0  # the widest averages are far from both


def test_edges_of_what_is_searched():
    assert at_edge(EMA(half_life_fraction=0.9)) == at_edge(EMA(half_life_fraction=0.95)) == ("half_life_fraction",)
    assert at_edge(EMA(half_life_fraction=0.1)) == at_edge(EMA(decay=0.9)) == ()
    assert at_edge(BEMA(half_life_fraction=0.01, correction=1.0)) == ("half_life_fraction",)
    assert at_edge(BEMA.paper(ema_power=1.0, bias_power=5.0)) == ("ema_power", "bias_power")
    assert at_edge(BEMA.paper(ema_power=0.0, bias_power=1.0)) == ()


def test_settings_that_a_rule_refuses_are_left_out():
    searched = list(rules_searched(BEMA(half_life_fraction=0.1, anchor=0.4)))
    assert 0 < len(searched) < len(list(rules_searched(BEMA())))
    assert all(rule.half_life_fraction < 0.4 for rule in searched)
