"""Inner products of increments, streamed from files."""

import numpy as np
import pytest
import torch
from tests.model_files import make_run as make_run, make_state

from lagless.checkpoints import CheckpointError, find_checkpoints
from lagless.lab.choose import increment_products


def expected(states):
    rows = [torch.cat([t.double().flatten() for t in s.values() if t.is_floating_point()]).numpy() for s in states]
    moved = np.diff(np.array(rows), axis=0)
    return moved @ moved.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory", [2**17, 2**30])
def test_they_are_of_all_floating_point_parameters(make_run, dtype, memory):
    states = [make_state(seed, dtype) for seed in range(5)]
    found = increment_products(find_checkpoints(make_run(states)), memory=memory)
    np.testing.assert_allclose(found, expected(states), rtol=1e-6)


def test_small_moves_of_large_weights_keep_their_digits(make_run):
    states = []
    for step in range(4):
        states.append({"weight": 1000.0 + torch.full((4096,), step * 2.0**-12, dtype=torch.float32)})
    found = increment_products(find_checkpoints(make_run(states)))
    np.testing.assert_array_equal(found, np.full((3, 3), 4096 * 2.0**-24))


def test_running_statistics_do_not_count(make_run):
    states = [{"weight": torch.full((3,), float(i)), "running_mean": torch.full((3,), 9.0 * i)} for i in range(3)]
    np.testing.assert_allclose(increment_products(find_checkpoints(make_run(states))), np.full((2, 2), 3.0))


def test_infinity_is_refused(make_run):
    states = [make_state(seed) for seed in range(3)]
    states[1]["embed.weight"][3, 2] = torch.inf
    with pytest.raises(CheckpointError, match="embed.weight"):
        increment_products(find_checkpoints(make_run(states)))
