"""The learning rate that a trainer logged beside a checkpoint."""

import json

import numpy as np
import pytest

from lagless.lab.choose import logged_rate


def log(folder, history):
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return logged_rate(folder)


def test_it_is_in_units_of_its_peak_and_linear_in_between(tmp_path):
    history = [{"step": 10, "learning_rate": 2e-4}, {"step": 20, "loss": 1.0}, {"step": 30, "learning_rate": 1e-4}]
    rate = log(tmp_path, history)
    assert rate is not None and rate.source == "log"
    np.testing.assert_allclose(rate.at(np.array([0.0, 10.0, 20.0, 30.0, 99.0])), [1.0, 1.0, 0.75, 0.5, 0.5])


def test_a_rate_of_zero_does_not_stop_the_clock(tmp_path):
    rate = log(tmp_path, [{"step": 1, "learning_rate": 1.0}, {"step": 2, "learning_rate": 0.0}])
    assert rate is not None and 0.0 < rate.at(np.array([2.0]))[0] < 1e-5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nonsense",
        "[" * 100_000,
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
        json.dumps({"log_history": None}),
        json.dumps({"log_history": [1, None, {"step": 1}]}),
        json.dumps({"log_history": [{"step": 1, "learning_rate": 1.0}]}),
        json.dumps({"log_history": [{"step": s, "learning_rate": 0.0} for s in (1, 2)]}),
        json.dumps({"log_history": [{"step": s, "learning_rate": float("nan")} for s in (1, 2)]}),
        json.dumps({"log_history": [{"step": "1", "learning_rate": True}, {"step": [], "learning_rate": {}}]}),
    ],
)
def test_what_is_no_log_is_none(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text, encoding="latin-1")
    assert logged_rate(tmp_path) is None


def test_there_may_be_no_file(tmp_path):
    assert logged_rate(tmp_path) is None
