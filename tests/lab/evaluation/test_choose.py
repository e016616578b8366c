"""``lagless choose``: predictions checked by evaluation, and what a user sees."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.lab.choose.quadratics import Quadratic
from tests.model_files import make_run as make_run

from lagless.checkpoints import find_checkpoints
from lagless.cli import main
from lagless.lab.averages import evaluate_averages
from lagless.lab.choose import DEFAULT, choose_rule, shortlist
from lagless.lab.evaluation import Sequences, held_out_sequences, sequence_losses

HELD_OUT = ["--sequences", "16", "--length", "48"]


@pytest.fixture
def lagless(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lagless", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return run


@pytest.fixture
def quadratic_run(make_run):
    """Checkpoints of SGD on a quadratic with a log of its learning rate; no model."""

    def make(run: Quadratic, every: int = 1, name: str = "run"):
        steps = run.steps[::every]
        states = [{"weight": torch.tensor(row, dtype=torch.float32)} for row in run.sample(0)[::every]]
        folder = make_run(states, steps, name)
        history = [{"step": step, "learning_rate": run.rate(step - 1)} for step in range(1, run.length + 1, 5)]
        state = json.dumps({"log_history": [*history, {"step": run.length, "learning_rate": run.rate(run.length)}]})
        (folder / f"checkpoint-{steps[-1]}" / "trainer_state.json").write_text(state)
        return folder

    return make


def paragraphs(printed):
    return [" ".join(part.split()) for part in printed.split("\n\n")]


def test_the_command_it_ends_in_makes_the_average_it_chose(quadratic_run, lagless, monkeypatch):
    folder = quadratic_run(Quadratic(1e-3, 0.1, 0.02, 1.0))
    code, printed, _ = lagless("choose", folder)
    assert code == 0 and printed.startswith("Take EMA 0.2: predicted best of 8 rules from 41 checkpoints.")
    words = shlex.split(printed.splitlines()[-1])
    assert words[0] == "lagless" and lagless(*words[1:])[0] == 0
    record = json.loads((Path(words[-1]) / "lagless.json").read_text())
    expected = shortlist(range(0, 1001, 25))["EMA 0.2"][1]
    np.testing.assert_allclose([source["weight"] for source in record["sources"]], expected, atol=1e-12)


@pytest.mark.parametrize("name", list(shortlist(range(0, 1001, 25))))
def test_every_rule_of_the_shortlist_has_a_command(quadratic_run, lagless, name):
    from lagless.cli._commands import average_command

    folder = quadratic_run(Quadratic(1e-3, 0.1, 0.02, 1.0, dimension=16))
    rule, weights = shortlist(range(0, 1001, 25))[name]
    command = average_command(rule, [folder], range(0, 1001, 25))
    assert command is not None
    words = shlex.split(command)
    assert lagless(*words[1:])[0] == 0
    record = json.loads((Path(words[-1]) / "lagless.json").read_text())
    np.testing.assert_allclose([source["weight"] for source in record["sources"]], weights, atol=1e-12)


def test_what_will_not_help_is_said_first(quadratic_run, lagless):
    code, printed, _ = lagless("choose", quadratic_run(Quadratic(1e-3, 0.03, 1e-5, 1.0, every=50)))
    assert code == 0 and "lagless average" not in printed
    assert paragraphs(printed)[0].startswith("Averaging will not help here: being behind would cost more")
    decayed = quadratic_run(Quadratic(5e-3, 0.1, 0.05, 1.0, decayed=True), name="decayed")
    assert lagless("choose", decayed)[1].startswith("The learning rate ended at 0 of its peak")


def test_it_fits_into_80_columns(quadratic_run, lagless):
    printed = lagless("choose", quadratic_run(Quadratic(1e-3, 0.1, 0.02, 1.0)))[1]
    assert max(map(len, printed.splitlines()[:-1])) <= 80  # the last is the command, which is copied


def test_options_that_select_checkpoints_are_repeated_in_the_command(quadratic_run, lagless):
    folder = quadratic_run(Quadratic(1e-3, 0.1, 0.02, 1.0))
    printed = lagless("choose", folder, "--at", "800")[1]
    assert "--at 800" in printed.splitlines()[-1] and "from 33 checkpoints" in printed


def test_too_few_checkpoints_are_refused_or_said(quadratic_run, make_run, lagless):
    run = Quadratic(1e-3, 0.1, 0.02, 1.0, dimension=64)
    code, _, error = lagless("choose", quadratic_run(run, every=40, name="two"))
    assert code == 2 and "2 checkpoints (steps 0, 1000)" in error
    code, printed, _ = lagless("choose", quadratic_run(run, every=10, name="five"))
    assert code == 0 and printed.startswith(f"Take {DEFAULT}, which is rarely harmful") and "5 checkpoints" in printed
    state = {"weight": torch.ones(3)}
    code, _, error = lagless("choose", make_run([state, state, state], name="same"))
    assert code == 2 and "steps 10 and 20 hold the same weights" in error


def test_with_text_it_is_the_best_of_the_shortlist_and_live(run, text, tokenizer):
    words = np.random.default_rng(0).choice("The cat dog sat on mat log and".split(), 400)
    text[0].write_text(" ".join(words))  # so that no two sequences are the same
    sequences = held_out_sequences(str(text[0]), tokenizer, length=48, count=16)
    trajectory = find_checkpoints(run)
    choice = choose_rule(trajectory, sequences)
    assert choice.basis == "measured"
    rules = {name: rule for name, (rule, _) in shortlist(trajectory.steps).items()}
    decide = Sequences(sequences.tokens[::2], sequences.labels[::2])
    losses = {
        found.name: found.result
        for found in evaluate_averages(trajectory, rules, lambda model: sequence_losses(model, decide).mean.value)
    }
    best = min(losses, key=losses.__getitem__)
    assert (choice.best.name if choice.best else "live") == best
    for option in choice.options:
        assert option.measured is not None and option.confirmed is not None
        assert option.measured.value == pytest.approx(losses[option.name] - losses["live"], abs=1e-6)
    assert any(abs(o.measured.value - o.confirmed.value) > 1e-4 for o in choice.options if o.measured and o.confirmed)
    measured = [option.measured.value for option in choice.options if option.measured]
    assert measured == sorted(measured)


def test_with_text_on_the_terminal(run, text, lagless):
    code, printed, _ = lagless("choose", run, "--data", text[0], *HELD_OUT)
    assert code == 0 and "deciding half" in printed and "other half" in printed
    rows = re.findall(r"^(?:EMA|BEMA|DEMA|decay) .*$", printed, re.MULTILINE)
    assert len(rows) >= 6 and max(map(len, printed.splitlines()[:-1])) <= 80


def test_too_little_text_is_refused(run, text, tokenizer):
    sequences = held_out_sequences(str(text[0]), tokenizer, length=48, count=3)
    with pytest.raises(ValueError, match="3 held-out sequences"):
        choose_rule(run, sequences)
