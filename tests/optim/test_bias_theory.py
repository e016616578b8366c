"""One-pass expansions of the bias against published numbers, and the command that prints all biases."""

import json
import sys

import numpy as np
import pytest
from rich.cells import cell_len

from lagless.cli import main
from lagless.lab.pictures._bias_tables import (
    FULL_HISTORY,
    FULL_HISTORY_COLUMNS,
    LONG_RUN,
    LONG_RUN_COLUMNS,
    ONE_STEP,
    ONE_STEP_COLUMNS,
)
from lagless.theory import AdamEstimator, FirstOrderAdam, FullHistoryAdam, GradientLaw, one_step_bias, stationary_bias
from lagless.updates import EmaWeights

BY_HAND = {
    "two nodes": (AdamEstimator("leave_one_out", two_nodes=True), (1.0909090909, 0.9285029191)),
    "first order": (FirstOrderAdam(), (1.0666666667, 0.9403891014)),
    "full history": (FullHistoryAdam(), (0.97, 0.8982590076)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_published_updates_of_one_coordinate(name):
    """Microbatches (1, 3, 2, 4) and (0, 2, -1, 3), betas (.9, .95), ε 0."""
    estimator, printed = BY_HAND[name]
    moments = estimator.start(np.zeros(()), np.zeros(()))
    for step, (batch, expected) in enumerate(zip(((1, 3, 2, 4), (0, 2, -1, 3)), printed, strict=True), start=1):
        gradients = np.array(batch, dtype=np.float64)
        update = estimator.folds(gradients, moments, EmaWeights.at((0.9, 0.95), step)).update
        assert update == pytest.approx(expected, abs=6e-11)
        moments = estimator.absorb(gradients, moments, (0.9, 0.95))
    assert (float(moments.m), float(moments.v)) == pytest.approx((0.325, 0.346875))
    if name == "full history":
        assert (float(moments.c), float(moments.w)) == pytest.approx((0.0172395833333, 0.0275802951389))


# Percent and standard error; columns as in the tables of the command.
PRINTED_ONE_STEP = {
    "Adam": ((-6.954, 0.004), (-1.499, 0.0005), (-1.269, 0.0005)),
    "leave one out": ((7.885, 0.008), (-0.006, 0.0005), (0.045, 0.0005)),
    "leave one out, two nodes": ((8.305, 0.008), (0.002, 0.0005), (0.048, 0.0005)),
    "leave one out, jackknife": ((-2.725, 0.007), (-0.130, 0.0005), (-0.054, 0.0005)),
    "leave one out, jackknife × 1.5": ((-8.030, 0.008), (-0.192, 0.0005), (-0.104, 0.0005)),
    "leave one out, authors' variance": ((6.153, 0.007), (-0.026, 0.0005), (0.038, 0.0005)),
    "two nodes, inverse of v̂ too": ((0.932, 0.008), (-0.149, 0.0005), (-0.078, 0.0005)),
    "split": ((2.114, 0.007), (0.022, 0.001), (0.012, 0.001)),
    "split, halves the same": ((-2.683, 0.004), (-0.471, 0.001), (-0.256, 0.0005)),
    "split, post-EMA": ((1.230, 0.007), (0.009, 0.001), (0.005, 0.001)),
    "split, pre-EMA": ((0.437, 0.008), (0.001, 0.001), (0.001, 0.001)),
    "split, pre-EMA, authors' constant": ((-0.681, 0.008), (-0.013, 0.001), (-0.006, 0.001)),
    "Adam, post-EMA": ((-11.646, 0.004), (-1.647, 0.0005), (-1.415, 0.0005)),
    "symmetric": ((10.415, 0.018), (0.369, 0.003), (0.404, 0.003)),
    "symmetric, post-EMA": ((6.554, 0.019), (0.179, 0.003), (0.206, 0.003)),
}


@pytest.mark.parametrize("column", range(3))
@pytest.mark.parametrize("name", PRINTED_ONE_STEP)
def test_one_step_table(name, column):
    """|z| < 4.5 between two simulations: 45 comparisons."""
    row, (law, beta2) = ONE_STEP[name], ONE_STEP_COLUMNS[column]
    bias = one_step_bias(row.estimator, row.law(law), beta2, samples=100_000, seed=31).total
    printed, error = PRINTED_ONE_STEP[name][column]
    assert abs(100 * bias.mean - printed) < 4.5 * np.hypot(100 * bias.standard_error, error)


# Percent (coupling, inversion). Printed without errors; rows that must agree differ by up to 0.014.
PRINTED_LONG_RUN = {
    "leave one out, two nodes": ((-0.993, 0.981), (-1.821, 1.546), (-1.478, 2.049)),
    "split, rolling": ((-0.327, 0.231), (-0.198, 0.125), (-0.478, 0.472)),
    "split, halves the same": ((-0.344, 0.230), (-0.209, 0.124), (-0.529, 0.471)),
    "split, post-EMA, rolling": ((-0.327, 0.217), (-0.198, 0.117), (-0.476, 0.421)),
}


@pytest.mark.parametrize("column", range(3))
@pytest.mark.parametrize("name", PRINTED_LONG_RUN)
def test_long_run_table(name, column):
    row, (law, beta2) = LONG_RUN[name], LONG_RUN_COLUMNS[column]
    bias = stationary_bias(row.estimator, row.law(law), (0.9, beta2), steps=300, chains=500, seed=5)
    for found, printed in zip(bias[1:], PRINTED_LONG_RUN[name][column], strict=True):
        assert abs(100 * found.mean - printed) < 4.5 * 100 * found.standard_error + 0.02


# Percent, total. Printed without errors; where its rows are also in the table above they differ by up to 0.04.
PRINTED_FULL_HISTORY = {
    "full history, coupling": (1.108, 1.665, 2.228, 1.788, 2.042),
    "full history, inversion": (-1.056, -1.933, -1.614, -1.781, -2.490),
    "full history": (0.111, 0.190, 0.209, -0.103, 0.470),
}


@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("name", PRINTED_FULL_HISTORY)
def test_full_history_table(name, column):
    row, (law, beta2) = FULL_HISTORY[name], FULL_HISTORY_COLUMNS[column]
    bias = stationary_bias(row.estimator, row.law(law), (0.9, beta2), steps=300, chains=500, seed=6).total
    assert abs(100 * bias.mean - PRINTED_FULL_HISTORY[name][column]) < 4.5 * 100 * bias.standard_error + 0.05


def test_the_command_prints_every_table(monkeypatch, capsys, tmp_path):
    arguments = ["--samples", "2000", "--steps", "2", "--chains", "20", "-o", str(tmp_path / "biases.json")]
    monkeypatch.setattr(sys, "argv", ["lagless", "theory", "preconditioner-bias", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and max(map(cell_len, printed.splitlines())) <= 80
    assert all(name in printed for table in (ONE_STEP, LONG_RUN, FULL_HISTORY) for name in table)
    record = json.loads((tmp_path / "biases.json").read_text())
    assert len(record) == 11 and {p.name for p in tmp_path.iterdir()} == {"biases.json"}
    assert all("standard_error" in row["total"] for table in record.values() for row in table.values())


def test_bad_laws_are_refused():
    with pytest.raises(ValueError, match="halves='new'; it must be one of 'fresh', 'rolling', 'same'"):
        GradientLaw(1.0, 1.0, 4, halves="new")  # pyright: ignore
    with pytest.raises(ValueError, match="noise='uniform'"):
        GradientLaw(1.0, 1.0, 4, noise="uniform")  # pyright: ignore
    with pytest.raises(ValueError, match="microbatches=3; two halves need an even number"):
        GradientLaw(1.0, 1.0, 3, halves="rolling")
