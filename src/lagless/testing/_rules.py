"""What every averaging rule must do, each as a function that takes a rule and asserts."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lagless.averaging import Averager
from lagless.rules import FloatArray, Rule, hyperparameters, rule_from_dict, rule_to_dict, ticks, trajectory_weights


def check_rule(rule: Rule) -> None:
    """Run every check of :data:`RULE_CHECKS` on ``rule``.

    Args:
        rule: an averaging rule; runs of ``update_after + 4 * update_freq`` steps are simulated with it.

    Raises:
        AssertionError: naming the property that fails.
    """
    for check in RULE_CHECKS:
        check(rule)


def coefficients_are_affine(rule: Rule) -> None:
    """Every update keeps constants (rows of [M v] sum to 1, M lower triangular) and every read does (c·1 + d = 1)."""
    for tick in ticks(rule, _steps(rule)):
        update, read = rule.update(tick), rule.read(tick)
        matrix, size = np.array(update.matrix), len(rule.buffer_keys)
        assert matrix.shape == (size, size) and len(update.live) == len(read.buffers) == size, "one row per label"
        assert np.allclose(matrix.sum(axis=1) + np.array(update.live), 1.0, rtol=0, atol=1e-12), f"[M v]1 = 1 at {tick}"
        assert np.array_equal(matrix, np.tril(matrix)), f"M is lower triangular at {tick}"
        assert abs(sum(read.buffers) + read.live - 1.0) < 1e-12, f"c·1 + d = 1 at {tick}"


def weights_sum_to_one(rule: Rule) -> None:
    """The weights on a trajectory sum to 1, at every step from the first update on and for uneven spacing."""
    steps = _steps(rule)
    for at in steps[rule.update_after + rule.update_freq :: max(1, rule.update_freq // 3)]:
        assert abs(trajectory_weights(rule, steps, at).sum() - 1.0) < 1e-9, f"weights sum to 1 at step {at}"


def labels_identify_contents(rule: Rule) -> None:
    """Labels are hashable, distinct within the rule, and equal for an equal rule."""
    labels = rule.buffer_keys
    assert len(set(labels)) == len(labels), "labels are distinct"
    assert copy.deepcopy(rule).buffer_keys == labels, "an equal rule has equal labels"


def rule_is_a_value(rule: Rule) -> None:
    """A rule is hashable, prints its hyperparameters and survives pickling."""
    assert pickle.loads(pickle.dumps(rule)) == rule and hash(copy.copy(rule)) == hash(rule), "rules are values"
    assert all(f"{name}=" in repr(rule) for name in hyperparameters(rule)), "repr shows every hyperparameter"


def json_makes_the_rule_again(rule: Rule) -> None:
    """Written as JSON and read again it is the same rule: hyperparameters are numbers, text, booleans, None, tuples."""
    try:
        record = json.dumps(rule_to_dict(rule))
    except TypeError as error:
        raise AssertionError(f"hyperparameters must be plain JSON, as states and exports hold them: {error}") from error
    again = rule_from_dict(json.loads(record))
    assert type(again) is type(rule) and again == rule, f"{again!r} came back from JSON for {rule!r}"


def averager_equals_filter(rule: Rule) -> None:
    """What an Averager reads, on and off update steps, is the filter's weights applied to the trajectory."""
    steps, iterates = _steps(rule), _trajectory(rule)
    live, averager = _start(rule, iterates)
    for step in steps[1:]:
        live.copy_(iterates[step])
        averager.update()
        if averager.updates():
            weights = torch.from_numpy(trajectory_weights(rule, steps, step))
            error = (averager.read()["w"] - weights @ iterates).abs().max()
            assert error < 1e-9, f"Averager and trajectory_weights differ by {error:.1e} at step {step}"


def constant_stays_constant(rule: Rule) -> None:
    """The average of a constant trajectory is that constant."""
    iterates = torch.full((len(_steps(rule)), 3), 1.25, dtype=torch.float64)
    _, averager = _start(rule, iterates)
    for _ in _steps(rule)[1:]:
        averager.update()
    assert (averager.read()["w"] - 1.25).abs().max() < 1e-12, "constant iterates give the constant"


def resumed_equals_never_stopped(rule: Rule) -> None:
    """Saving and loading the state at any step changes no bit of what follows."""
    steps, iterates = _steps(rule), _trajectory(rule)
    live, averager = _start(rule, iterates)
    for step in steps[1:]:
        if step % max(1, rule.update_freq // 2) == 0:
            state = copy.deepcopy(averager.state_dict())
            _, averager = _start(rule, iterates, live)
            averager.load_state_dict(state)
        live.copy_(iterates[step])
        averager.update()
    resumed = averager.read()["w"]
    live, whole = _start(rule, iterates)
    for step in steps[1:]:
        live.copy_(iterates[step])
        whole.update()
    assert torch.equal(resumed, whole.read()["w"]), "a resumed average differs"


def reading_is_neutral(rule: Rule) -> None:
    """Reading and applying at every step changes no bit of the state or of the live weights."""
    steps, iterates = _steps(rule), _trajectory(rule)
    live, averager = _start(rule, iterates)
    for step in steps[1:]:
        live.copy_(iterates[step])
        averager.update()
        if averager.updates():
            before = copy.deepcopy(averager.state_dict())
            averager.read()
            with averager.applied():
                assert not averager.updates() or torch.isfinite(live).all()
            after = averager.state_dict()
            assert torch.equal(live, iterates[step]), "the live weights changed"
            assert before["meta"] == after["meta"], "the state's numbers changed"
            assert all(torch.equal(t, after["tensors"][n]) for n, t in before["tensors"].items()), "a buffer changed"


RULE_CHECKS: tuple[Callable[[Rule], None], ...] = (
    coefficients_are_affine,
    weights_sum_to_one,
    labels_identify_contents,
    rule_is_a_value,
    json_makes_the_rule_again,
    averager_equals_filter,
    constant_stays_constant,
    resumed_equals_never_stopped,
    reading_is_neutral,
)


def _steps(rule: Rule) -> list[int]:
    # Off a multiple of update_freq at the end, so that the tail is tested too.
    return list(range(rule.update_after + 4 * rule.update_freq + rule.update_freq // 2 + 1))


def _trajectory(rule: Rule) -> Tensor:
    """A random walk, shape (steps, 3), float64."""
    walk: FloatArray = np.random.default_rng(0).standard_normal((len(_steps(rule)), 3)).cumsum(axis=0)
    return torch.from_numpy(walk)


def _start(rule: Rule, iterates: Tensor, live: Tensor | None = None) -> tuple[Tensor, Averager]:
    weights = iterates[0].clone() if live is None else live
    return weights, Averager({"w": weights}, rule)
