"""The prediction against the exact truth on quadratics, and what it refuses."""

import numpy as np
import pytest
from tests.lab.choose.quadratics import Quadratic, products_of

from lagless.lab.choose import (
    DEFAULT,
    LearningRate,
    constant_rate,
    fit_motion,
    path_of,
    predict,
    rate_of_increments,
    shortlist,
)

RUNS = {
    "drift and noise": Quadratic(1e-3, 0.1, 0.02, 1.0),
    "mostly drift": Quadratic(1e-3, 0.03, 0.01, 1.0),
    "settled": Quadratic(5e-3, 0.1, 0.05, 0.0, every=20),
    "no noise": Quadratic(1e-3, 0.03, 1e-5, 1.0, every=50),
    "few checkpoints": Quadratic(1e-3, 0.05, 0.02, 1.0, every=100),
    "decayed": Quadratic(5e-3, 0.1, 0.05, 1.0, decayed=True),
}
LINEAR = LearningRate((0.0, 1000.0), (1.0, 0.0), "log")


@pytest.fixture(scope="module", params=RUNS)
def case(request):
    run = RUNS[request.param]
    rules = shortlist(run.steps)
    exact = dict(zip(rules, run.excess(np.array([weights for _, weights in rules.values()])), strict=True))
    return request.param, run, exact


@pytest.mark.parametrize("seed", [0, 1])
def test_the_predicted_ranking_is_the_exact_one(case, seed):
    name, run, exact = case
    choice = predict(products_of(run.sample(seed)), run.steps, LINEAR if run.decayed else None, drift_weight=1.0)
    values = [*exact.values(), 0.0]
    spread = max(values) - min(values)
    for i, better in enumerate(choice.options):  # apart from rules that are level
        for worse in choice.options[i + 1 :]:
            assert exact[better.name] < exact[worse.name] + 0.06 * spread, (better.name, worse.name)
    chosen = 0.0 if choice.best is None else exact[choice.best.name]
    assert chosen < min(values) + 0.06 * spread
    assert (choice.best is None) == (name == "no noise")
    assert choice.decayed == run.decayed


@pytest.mark.parametrize("seed", [0, 1])
def test_of_sgd_the_unit_is_that_of_the_loss(case, seed):
    _, run, exact = case
    choice = predict(products_of(run.sample(seed)), run.steps, LINEAR if run.decayed else None, drift_weight=1.0)
    predicted = np.array([option.predicted for option in choice.options])
    truth = np.array([exact[option.name] for option in choice.options])
    assert predicted @ truth / (truth @ truth) == pytest.approx(1.0, abs=0.2)


def test_a_learning_rate_that_was_not_logged_is_seen_in_the_increments():
    run = RUNS["decayed"]
    choice = predict(products_of(run.sample(0)), run.steps)
    assert choice.rate.source == "increments" and choice.decayed
    assert any("not logged" in doubt for doubt in choice.doubts)
    assert predict(products_of(RUNS["settled"].sample(0)), RUNS["settled"].steps).rate.source == "constant"


def test_scale_of_the_parameters_and_rotations_change_nothing():
    run = RUNS["drift and noise"]
    iterates = run.sample(0)
    one, other = (predict(products_of(given), run.steps) for given in (iterates, 10.0 * iterates[:, ::-1] + 3.0))
    assert [option.name for option in one.options] == [option.name for option in other.options]
    for mine, theirs in zip(one.options, other.options, strict=True):
        assert theirs.predicted == pytest.approx(100.0 * mine.predicted, rel=1e-5)


def test_time_may_be_counted_in_any_unit():
    run = RUNS["drift and noise"]
    products = products_of(run.sample(0))
    one, other = (predict(products, [scale * step for step in run.steps]) for scale in (1, 7))
    for mine, theirs in zip(one.options, other.options, strict=True):
        assert mine.name == theirs.name
        assert mine.predicted == pytest.approx(7.0 * theirs.predicted, rel=1e-6)  # rates are per step


def test_checkpoints_may_be_uneven():
    run = RUNS["drift and noise"]
    kept = np.flatnonzero(np.random.default_rng(3).random(len(run.steps)) < 0.6)
    kept = np.unique([0, *kept, len(run.steps) - 1])
    steps = [run.steps[i] for i in kept]
    rules = shortlist(steps)
    weights = np.zeros((len(rules), len(run.steps)))
    weights[:, kept] = [row for _, row in rules.values()]
    exact = dict(zip(rules, run.excess(weights), strict=True))
    choice = predict(products_of(run.sample(0)[kept]), steps, drift_weight=1.0)
    assert choice.best is not None and exact[choice.best.name] <= 0.98 * min(exact.values())


@pytest.mark.parametrize("count", [3, 5])
def test_few_checkpoints_are_told_apart_from_many(count):
    run = RUNS["drift and noise"]
    kept = np.linspace(0, len(run.steps) - 1, count).astype(int)
    choice = predict(products_of(run.sample(0)[kept]), [run.steps[i] for i in kept])
    assert choice.basis == "default" and choice.best is not None and choice.best.name == DEFAULT
    assert f"There are {count} checkpoints" in choice.doubts[0]


def test_motion_that_is_of_another_kind_gives_no_prediction():
    steps = list(range(0, 2001, 100))
    swinging = np.where(np.arange(21) % 2 == 0, 1.0, -1.0)[:, None] * np.ones((1, 5))  # no OU process has this
    choice = predict(products_of(swinging + 1e-3 * np.arange(21)[:, None]), steps)
    assert choice.basis == "default" and "nothing is predicted" in choice.doubts[0]


def test_drift_may_be_weighed():
    run = RUNS["drift and noise"]
    one, half = (predict(products_of(run.sample(0)), run.steps, drift_weight=weight) for weight in (1.0, 0.5))
    drifts = {option.name: option.drift for option in one.options}
    for option in half.options:
        assert option.drift == pytest.approx(0.5 * drifts[option.name])
    assert [option.predicted for option in half.options] == sorted(option.predicted for option in half.options)


def test_a_poor_fit_does_not_say_that_there_is_no_noise():
    """A burst of drift in the middle of a run is no sum of exponentials, and noise might hide in what is left."""
    steps, pace = list(range(0, 1001, 50)), np.ones(21)
    pace[6:10] = 2.0
    choice = predict(products_of(np.cumsum(pace)[:, None] * np.ones((1, 40))), steps)
    assert choice.options[0].predicted > 0.0 and choice.motion.misfit < 0.5
    assert choice.basis == "default" and choice.best is not None
    assert any("No noise is seen" in doubt for doubt in choice.doubts)


def test_what_is_refused():
    iterates = RUNS["drift and noise"].sample(0)[:8]
    steps = list(range(0, 8))
    same = iterates.copy()
    same[4] = same[3]
    with pytest.raises(ValueError, match="steps 3 and 4 hold the same weights"):
        predict(products_of(same), steps)
    with pytest.raises(ValueError, match="2 checkpoints .* 3 or more"):
        predict(products_of(iterates[:2]), [0, 1])
    returned = np.eye(8)[[0, 1, 2, 3, 4, 5, 6, 0]]
    with pytest.raises(ValueError, match="steps 0 and 7 hold the same weights"):
        path_of(products_of(returned), steps)


def test_progress_is_along_the_line_from_first_to_last():
    generator = np.random.default_rng(0)
    iterates, steps = generator.standard_normal((9, 30)), [0, 10, 20, 30, 40, 50, 60, 70, 100]
    moved = iterates - iterates[0]
    along = moved @ moved[-1] / (moved[-1] @ moved[-1])
    path = path_of(products_of(iterates), steps)
    np.testing.assert_allclose(path.progress, along, atol=1e-12)
    aside = np.linalg.norm(moved - np.outer(along, moved[-1]), axis=1) / path.length
    np.testing.assert_allclose(path.aside, aside, atol=1e-7)
    straight = path_of(products_of(np.outer(np.array(steps) / 100, np.ones(3))), steps)
    assert straight.early == pytest.approx(1.0) and straight.late == pytest.approx(1.0)
    slowing = path_of(products_of(np.outer(np.sqrt(np.array(steps)), np.ones(3))), steps)
    assert slowing.early > 1.0 > slowing.late


def test_the_fit_recovers_one_direction():
    a = float(np.geomspace(0.5 / 1000, 3.0 / 50, 12)[5])  # one of the rates that are fitted
    steps = np.arange(0, 1001, 50)
    drift = np.exp(-a * steps)
    motion = fit_motion(np.outer(np.diff(drift), np.diff(drift)), list(steps), constant_rate())
    weights = np.full((1, len(steps)), 1.0 / len(steps))
    truth = 0.5 * a * (float(weights[0] @ drift) ** 2 - drift[-1] ** 2)
    change = motion.change(weights)
    assert change.total[0] == pytest.approx(truth, rel=0.02)
    assert abs(change.noise[0]) < 0.02 * truth


def test_increments_give_a_rate_that_never_rises():
    lengths = np.array([1.0, 4.0, 3.0, 3.5, 1.0])
    rate = rate_of_increments(np.diag(lengths**2), [0, 1, 2, 3, 4, 5])
    np.testing.assert_allclose(rate.multipliers, np.array([4.0, 4.0, 3.5, 3.5, 1.0]) / 4.0)
