"""The laboratory: what its captions say is in its numbers, and its files are whole."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from lagless import BEMA, EMA
from lagless.cli import main
from lagless.theory import AveragingProblem, QuadraticSGD, choose, estimate_run, moments_of

if importlib.util.find_spec("matplotlib") is None:
    pytest.skip("the laboratory draws with matplotlib", allow_module_level=True)

from lagless.checkpoints import find_checkpoints
from lagless.lab.pictures import (
    _pictures,
    advise,
    estimate_checkpoints,
    print_advice,
    print_estimate,
)
from lagless.lab.pictures._advice_picture import draw_advice
from lagless.lab.pictures._checkpoints import sample_ranges
from lagless.lab.pictures._distances import PROCESS, draw_figure_2, follow_rules, reached, rms, start_distance
from lagless.lab.pictures._drawing import _spread, plain
from lagless.lab.pictures._paths import draw_path
from lagless.lab.pictures._pictures import Effort, make_primer_figures, run_laboratory
from lagless.lab.pictures._preconditioning import biases, cancellation, draw_biases, draw_cancellation
from lagless.lab.pictures._primers import PRIMERS
from lagless.lab.pictures._pulls import draw_controls, draw_guarantees, draw_pull

PRIMER_TEXTS = sorted((Path(__file__).parents[2] / "docs" / "primers").glob("*.md"))
SMALL = Effort(steps=200, paths=60, samples=2000, chains=40)


def quiet():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture(scope="module")
def curves():
    return follow_rules(steps=2000, paths=200, points=40)


@pytest.fixture(scope="module")
def primers():
    """The figures of the primers, each drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pictures, "PRIMERS", {name: functools.cache(draw) for name, draw in PRIMERS.items()})
        yield


@pytest.fixture(scope="module")
def laboratory(primers, tmp_path_factory):
    out = tmp_path_factory.mktemp("laboratory") / "out"
    return run_laboratory(out, console=quiet(), effort=SMALL)


# Figures 2 and 14(a)


def test_figure_2_shows_what_the_paper_shows(curves):
    """EMA far behind; BEMA and OUEMA ahead of it and of the last iterate on the way in, BEMA first."""
    arrivals = {name: reached(curves, name) for name in ("last iterate", "EMA", "OUEMA", "BEMA")}
    assert arrivals["EMA"] is None
    assert arrivals["BEMA"] <= arrivals["OUEMA"] < arrivals["last iterate"]
    half = {name: np.argmax(rms(curves, name) < 0.5 * start_distance(curves)) for name in arrivals}
    assert half["BEMA"] <= half["OUEMA"] <= half["EMA"] - 5
    assert (rms(curves, "BEMA") < rms(curves, "EMA")).all() and (rms(curves, "OUEMA") < rms(curves, "EMA")).all()


def test_figure_14a_puts_dema_between(curves):
    assert (rms(curves, "DEMA") < rms(curves, "EMA")).all()
    assert reached(curves, "DEMA") > reached(curves, "BEMA")


def test_sampled_curves_agree_with_exact_ones(curves):
    """400 z-values of ten correlated rules: none beyond 4.5."""
    assert curves.largest_z() < 4.5


def test_no_unbiased_estimator_is_better_than_the_dotted_line(curves):
    np.testing.assert_allclose(curves.optimum, 20 * PROCESS.eta * 49.0 / curves.times)
    assert start_distance(curves) == pytest.approx(3.0 * 20**0.5)


def test_the_caption_of_figure_2_quotes_its_numbers(curves):
    picture = draw_figure_2(curves)
    numbers = picture.numbers["rules"]
    assert f"{numbers['BEMA']['steps_to_a_tenth']:,.0f} steps (BEMA)" in picture.caption
    assert f"EMA {numbers['EMA']['rms_at_end']:.2f}" in picture.caption
    assert "not within the run for EMA" in picture.caption


# The other pictures


def test_the_pull_pays_for_its_limit_with_its_rate():
    numbers = draw_pull(paths=1000, gains=(0.0, 1.0)).numbers
    assert numbers["variance_gain_at_1"] > 5 and numbers["slowdown_at_1"] > numbers["variance_gain_at_1"]
    assert 0.9 < numbers["matched_ratio_at_1"] < 1.0
    exact = dict(zip(np.round(numbers["c"], 12), numbers["variance"], strict=True))
    zero = numbers["sampled"]["0.0"]
    assert abs(zero["mean"] - exact[0.0]) < 4.5 * zero["standard_error"]  # z-bound 4.5
    best = int(np.argmin(numbers["variance"]))
    assert abs(numbers["c"][best] - numbers["optimal_gain"]) < 0.02


def test_guarantees_hold_and_are_paid_for():
    """Gaps lie below their bounds; the improvement is above 1/(8a), and a matched EMA has as much of it."""
    numbers = draw_guarantees(paths=50).numbers
    a, better = numbers["a"], numbers["improvement"]
    assert (better >= 1.0 / (8.0 * a)).all() and better[0] > 500
    assert (numbers["slowdown"] >= better).all()
    np.testing.assert_allclose(numbers["improvement_of_matched_ema"], better, rtol=0.15)
    for gain, gaps in numbers["gaps"].items():
        for gap, bound in zip(gaps, numbers["bounds"][gain], strict=True):
            assert 0.0 < gap["mean"] + 4.5 * gap["standard_error"] < bound


def test_controls_are_ordered_as_optimality_demands():
    for found in draw_controls(intervals=200).numbers["costs"].values():
        totals = {name: cost["total"] for name, cost in found.items()}
        assert totals["minimum known"] < totals["posterior mean"]
        assert totals["posterior mean"] <= min(
            totals["none"], totals["running average"], totals["running average, early gain"]
        ) * (1 + 1e-9)


def test_the_two_biases_of_adam_nearly_cancel_and_splitting_removes_the_coupling():
    """Within 4.5 standard errors of 0 for the coupling of split batches."""
    numbers = draw_biases(biases(samples=100_000, steps=300, chains=300)).numbers
    adam, split = numbers["Adam"]["long run"], numbers["split"]["long run"]
    assert adam["coupling"]["mean"] < -0.01 < 0.009 < adam["inversion"]["mean"]
    assert abs(adam["total"]["mean"]) < 0.15 * adam["inversion"]["mean"]
    assert abs(split["coupling"]["mean"]) < 4.5 * split["coupling"]["standard_error"]


def test_cancellation_is_said_as_it_is():
    picture = draw_cancellation(cancellation((0.8, 0.95), steps=200, chains=200))
    assert "opposite signs for every β₂" in picture.caption and "near β₂ = 0.95" in picture.caption


def test_labels_keep_their_order_and_their_distance_inside_the_axes():
    for heights in ([0.5, 0.5, 0.51], [0.0, 0.01, 0.02], [0.98, 0.99, 1.0], [0.1, 0.9]):
        places = _spread(heights, 0.06)
        assert (np.diff(places) > 0.06 - 1e-9).all() and 0.0 <= places[0] and places[-1] <= 1.0
    assert _spread([0.1, 0.9], 0.06) == [0.1, 0.9]


def test_numbers_become_plain_json():
    value = {"a": np.array([1.0, np.nan]), 2: (np.int64(3), 0.123456789), "t": True}
    assert json.loads(json.dumps(plain(value))) == {"a": [1.0, None], "2": [3, 0.123457], "t": True}


# The page


def test_the_page_needs_nothing_beside_it_and_every_figure_has_a_caption(laboratory):
    page = laboratory.page.read_text()
    assert page.count("<img") == page.count("data:image/png;base64,") == len(laboratory.pictures) == 16
    assert not re.search(r"(src|href)='(?!data:|#)", page) and "http" not in page.replace("http-equiv", "")
    for picture in laboratory.pictures:
        assert (laboratory.out / f"{picture.name}.png").stat().st_size > 10_000
        assert len(picture.caption) > 100 and "nan" not in picture.caption.lower().split()
    assert {path.name for path in laboratory.out.iterdir()} == {
        "laboratory.html",
        "lagless.json",
        "numbers.json",
        *(f"{picture.name}.png" for picture in laboratory.pictures),
    }


def test_the_numbers_are_kept(laboratory):
    record = json.loads((laboratory.out / "numbers.json").read_text())
    assert record["seed"] == 0 and record["effort"]["paths"] == 60
    assert set(record["figures"]) == {picture.name for picture in laboratory.pictures}


def test_an_existing_folder_is_replaced_only_if_the_laboratory_made_it(laboratory, tmp_path):
    with pytest.raises(ValueError, match="is not empty"):
        run_laboratory(laboratory.out, console=quiet(), effort=SMALL)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="did not write this one"):
        run_laboratory(tmp_path, overwrite=True, console=quiet(), effort=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_behind_on_failure(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(_pictures, "write_page", fail)
    monkeypatch.setattr(_pictures, "_parts", lambda *_: [("section", "part", lambda: [draw_path(0)])])
    with pytest.raises(RuntimeError, match="no"):
        run_laboratory(tmp_path / "out", console=quiet(), effort=SMALL)
    assert not list(tmp_path.iterdir())


# Primers


def test_every_primer_has_its_figure_and_no_other(primers, tmp_path):
    assert {path.stem for path in PRIMER_TEXTS} == set(PRIMERS)
    written = make_primer_figures(tmp_path / "figures", console=quiet())
    assert sorted(path.name for path in written) == sorted(f"{name}.png" for name in PRIMERS)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {f"{name}.png" for name in PRIMERS}
    for text in PRIMER_TEXTS:
        assert f"(figures/{text.stem}.png)" in text.read_text()
        assert (text.parent / "figures" / f"{text.stem}.png").is_file()


@pytest.mark.parametrize("text", PRIMER_TEXTS, ids=lambda path: path.stem)
def test_snippets_of_the_primers_print_what_is_printed_below_them(text):
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text.read_text(), re.DOTALL)
    assert blocks
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue() == expected


# Advice, and estimates from checkpoints

ANSWERS = {"curvature_min": 0.01, "curvature_max": 1.0, "noise": 1.0, "distance": 3.0, "lr": 0.1, "steps": 500}


def test_advice_is_printed_with_its_limits_and_drawn(tmp_path):
    console = quiet()
    advice = advise(**ANSWERS, plot=tmp_path / "plot.png", console=console)
    text = console.file.getvalue()
    assert f"recommended: {advice.recommended.name}" in text
    assert f"{advice.gain(advice.live):.2f} times lower than that of the live weights" in text
    assert "constant learning rate" in text and "held-out data" in text
    for family in (
        "live  ",
        "EMA(",
        "BEMA.paper(",
        "OUEMA.paper(",
        "DEMA.paper(",
        "PowerEMA(",
        "WindowAverage(",
        "UniformAverage(",
    ):
        assert family in text
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_calls_can_be_copied_from_a_narrow_terminal():
    """At 80 columns the table fits, and the call of every setting in it stands unbroken on one line, best first."""
    console = Console(file=io.StringIO(), width=80)
    advice = choose(AveragingProblem(**ANSWERS))
    print_advice(advice, console)
    lines = console.file.getvalue().splitlines()
    calls = [line.removeprefix("recommended:").strip() for line in lines if line.endswith(")") and "=" in line]
    best = [advice.recommended, *(s for s in advice.best_of_families if s is not advice.recommended)]
    assert calls == [setting.name for setting in best if setting.rule is not None]
    assert sum(line.strip().startswith(("EMA  ", "PowerEMA  ", "UniformAverage  ")) for line in lines) == 3


WITHOUT_MATPLOTLIB = """
import json, sys
import lagless.lab.pictures
from lagless.cli import main

assert "matplotlib" not in sys.modules
for arguments, code in json.loads(sys.argv[1]):
    sys.argv = ["lagless", "theory", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == code, (arguments, end.code)
"""


def test_advice_and_statements_need_no_matplotlib(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not there')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    numbers = [f"--{name.replace('_', '-')}={value}" for name, value in ANSWERS.items()]
    commands = json.dumps([(["choose", *numbers], 0), (["check", "--help"], 0), (["figures"], 2)])
    subprocess.run([sys.executable, "-c", WITHOUT_MATPLOTLIB, commands], env=environment, check=True)


def test_a_bad_seed_is_refused_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lagless", "theory", "figures", "--seed", "-1", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "seed=-1" in capsys.readouterr().err


def test_advice_says_which_numbers_are_missing(tmp_path):
    with pytest.raises(ValueError, match="--noise, --lr: needed"):
        advise(**{**ANSWERS, "noise": None, "lr": None}, console=quiet())
    with pytest.raises(ValueError, match=r"must be a \.png"):
        advise(**ANSWERS, plot=tmp_path / "plot.txt", console=quiet())


def test_a_picture_of_few_settings_can_be_drawn():
    problem = AveragingProblem(0.1, 0.1, noise=1.0, distance=1.0, lr=0.1, steps=50)
    advice = choose(problem, {"EMA": EMA(half_life=5), "BEMA": BEMA.paper(update_freq=40)})
    assert set(draw_advice(advice).numbers) == {"live", "EMA", "BEMA"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of SGD, 3,200 parameters in two tensors and a counter, stored every 20 of 4,000 steps."""
    folder = tmp_path_factory.mktemp("run")
    a = np.geomspace(0.01, 0.1, 16) / 0.1
    sgd = QuadraticSGD(A=np.diag(a), mu=np.arange(16.0), theta0=np.arange(16.0) + 3.0, lr=0.1, Sigma=1.0)
    steps = list(range(0, 4001, 20))
    path = sgd.sample(200, steps, seed=0).transpose(0, 1).reshape(len(steps), -1)
    for step, row in zip(steps, path.float(), strict=True):
        tensors = {"w": row[:2000].reshape(40, 50).clone(), "b": row[2000:].clone(), "n": torch.tensor([step])}
        save_file(tensors, folder / f"step-{step}.safetensors")
    return folder, path.float().double().numpy(), steps


def test_checkpoints_give_the_estimate_of_the_trajectory_itself(run):
    """The same numbers but for the grouping of coordinates; the truth within |z| < 4.5."""
    folder, path, steps = run
    stored, kept = estimate_checkpoints(folder), estimate_run(moments_of(path, steps))
    assert stored.coordinates == 3200 and stored.first_step == kept.first_step
    assert stored.rate_min.mean == pytest.approx(kept.rate_min.mean, rel=0.03)
    assert stored.step_noise.mean == pytest.approx(kept.step_noise.mean, rel=0.01)
    for found, truth in (
        (stored.rate_min, 0.01),
        (stored.rate_max, 0.1),
        (stored.step_noise, 0.1),
        (stored.distance, 3),
    ):
        assert abs(found.mean - truth) < 4.5 * found.standard_error


def test_a_misfit_beyond_the_standard_errors_is_said(run):
    estimate = estimate_checkpoints(run[0])
    for misfit, said in ((0.5 * estimate.sampling_error, False), (2.0 * estimate.sampling_error, True)):
        console = quiet()
        print_estimate(replace(estimate, misfit=misfit), console)
        assert ("more than the standard errors" in console.file.getvalue()) == said


def test_a_sample_of_ranges_is_drawn_by_seed_and_covers_all_if_it_may(run, monkeypatch):
    monkeypatch.setattr("lagless.lab.pictures._checkpoints._RANGE", 100)
    trajectory = find_checkpoints(run[0])
    every = sample_ranges(trajectory, 10**6, seed=0)
    assert sum(stop - first for _, first, stop in every) == 3200 and {name for name, *_ in every} == {"w", "b"}
    some, same, other = (sample_ranges(trajectory, 800, seed=seed) for seed in (0, 0, 1))
    assert some == same != other and set(some) < set(every)
    assert 800 <= sum(stop - first for _, first, stop in some) <= 900
    with pytest.raises(ValueError, match="sample=0"):
        estimate_checkpoints(run[0], sample=0)


def test_advice_from_a_run_prints_the_estimate_and_lets_numbers_be_replaced(run):
    console = quiet()
    advice = advise(steps=None, run=run[0], distance=7.0, console=console)
    text = console.file.getvalue()
    assert "3,200 parameters" in text and "slowest rate per step" in text and "±" in text
    assert advice.problem.distance == 7.0 and advice.problem.steps == 4000
    assert advice.problem.curvature_min == pytest.approx(0.01, rel=0.1)
