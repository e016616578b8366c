import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lagless.cli import app
from lagless.lab.report import (
    Claim,
    Figure,
    Run,
    Study,
    chosen_runs,
    compare,
    load_study,
    save_study,
    write_reports,
)
from lagless.lab.report._figures import _best, _table
from lagless.lab.statistics import Verdict, paired_difference

EFFECT, SEEDS = {"ema": 0.0, "bema": -0.3, "dema": 0.3, "ouema": 0.0}, range(5)


def study(**changes) -> Study:
    """Four methods over three settings and five seeds; seeds differ by much more than methods do."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 5, size=len(SEEDS))
    runs = [
        Run(
            method=method,
            setting={"kappa": kappa, "eta": 0.2},
            seed=seed,
            scores={
                "valid/loss": shared[seed] + effect + (kappa - 0.5) ** 2,
                # on test data another setting would be best: choosing by it would show
                "test/loss": shared[seed] + effect + (kappa - 0.2) ** 2 + rng.normal(0, 0.01),
            },
            curves={"test/loss": [(1, 3.0), (2, 2.0 + effect)]},
        )
        for method, effect in EFFECT.items()
        for kappa in (0.2, 0.5, 0.8)
        for seed in SEEDS
    ]
    claims = [
        Claim(text=f"{m} beats EMA", source="ours", method=m, baseline="ema", score="test/loss", claimed=-1,
              selected_by="valid/loss")
        for m in ("bema", "dema", "ouema")
    ]  # fmt: skip
    figures = [
        Figure(kind="curves", caption="curves", score="test/loss", methods=["ema", "bema"]),
        Figure(kind="map", caption="map", score="test/loss", methods=["bema"], x="kappa", y="eta", minus="ema"),
    ]
    parts = dict(
        name="toy", title="A toy | with a bar", question="Which?", scale="numbers", claims=claims, runs=runs,
        figures=figures, commands=["python toy.py"], commit="abc", machine={"cpu": "toy"}, seconds=60.0,
        notes=["nothing <odd>"],
    )  # fmt: skip
    return Study(**(parts | changes))


def test_verdicts_on_known_effects():
    findings = compare(study())
    assert [f.verdict for f in findings] == [Verdict.REPRODUCED, Verdict.CONTRADICTED, Verdict.NOT_SEEN]
    assert findings[0].difference.value == pytest.approx(-0.3, abs=0.02)
    assert findings[0].difference.n == 5


def test_differences_below_the_floor_do_not_matter():
    claims = [claim.model_copy(update={"floor": 0.5}) for claim in study().claims]
    assert {finding.verdict for finding in compare(study(claims=claims))} == {Verdict.TOO_SMALL}
    with pytest.raises(ValueError, match="floor"):
        Claim(text="x", source="ours", method="a", baseline="b", score="s", claimed=-1, floor=-1.0)


def test_a_choice_at_the_edge_is_marked(tmp_path):
    assert [finding.method.at_edge for finding in compare(study())] == [()] * 3  # 0.5 is in the middle
    claims = [claim.model_copy(update={"selected_by": "test/loss"}) for claim in study().claims]
    for finding in compare(study(claims=claims)):  # chosen there, 0.2 is at the end; eta has one value
        assert finding.method.at_edge == finding.baseline.at_edge == ("kappa",)
    write_reports([study(claims=claims)], tmp_path)
    assert "best of 3, at the edge in kappa" in (tmp_path / "toy.md").read_text("utf-8")


def test_settings_are_chosen_by_the_validation_score_alone():
    for finding in compare(study()):
        assert finding.method.setting["kappa"] == finding.baseline.setting["kappa"] == 0.5
        assert (finding.method.budget, finding.equal_budgets) == (3, True)


def test_p_values_are_corrected_for_all_claims_of_the_study():
    whole = study()
    alone = [compare(whole.model_copy(update={"claims": [claim]}))[0].p_value for claim in whole.claims]
    together = [finding.p_value for finding in compare(whole)]
    assert together[np.argmin(alone)] == pytest.approx(3 * min(alone))


def test_a_setting_that_diverged_on_one_seed_cannot_be_chosen_and_is_counted():
    whole, diverged = study(), ("bema", 0.5, 3)
    runs = [
        run.model_copy(update={"scores": None} if (run.method, run.setting["kappa"], run.seed) == diverged else {})
        for run in whole.runs
    ]
    finding = compare(whole.model_copy(update={"runs": runs}))[0]
    assert finding.method.setting["kappa"] != 0.5 and finding.method.diverged == 1


def in_two_stages() -> Study:
    """Settings tried on seed 100, the best two on seed 101 too, and the choice reported on others."""
    tried = {0.2: [1.0, 4.0], 0.5: [2.0, 2.0], 0.8: [2.5]}
    tuning = [
        Run(method=m, setting={"kappa": kappa}, seed=100 + i, scores={"valid/loss": loss}, tuning=True)
        for m in ("ema", "bema")
        for kappa, losses in tried.items()
        for i, loss in enumerate(losses)
    ]
    reported = [
        # validation losses of reporting seeds, by which 0.2 would be best, choose nothing
        Run(
            method=m, setting={"kappa": kappa}, seed=seed, scores={"valid/loss": kappa, "test/loss": loss + 0.01 * seed}
        )
        for m, loss in (("ema", 1.0), ("bema", 0.9))
        for kappa in (0.2, 0.5)
        for seed in SEEDS
    ]
    claim = Claim(text="", source="ours", method="bema", baseline="ema", score="test/loss", claimed=-1,
                  selected_by="valid/loss")  # fmt: skip
    return study(runs=[*tuning, *reported], claims=[claim])


def test_tuning_runs_choose_and_other_seeds_are_reported():
    [finding] = compare(in_two_stages())
    for side in (finding.method, finding.baseline):
        assert side.setting == {"kappa": 0.5} and side.budget == 3 and set(side.scores) == set(SEEDS)


def test_a_choice_that_was_not_reported_is_refused():
    whole = in_two_stages()
    runs = [run for run in whole.runs if run.tuning or run.setting["kappa"] != 0.5]
    with pytest.raises(ValueError, match="chooses {'kappa': 0.5}, and no reported run has it"):
        compare(whole.model_copy(update={"runs": runs}))


def test_settings_held_fixed_apply_to_the_sides_that_have_them():
    whole = study()
    extra = [Run(method="live", setting={}, seed=s, scores={"test/loss": 0.0}) for s in SEEDS]
    claim = Claim(
        text="at 0.2", source="ours", method="bema", baseline="live", score="test/loss", claimed=-1, at={"kappa": 0.2}
    )
    finding = compare(whole.model_copy(update={"runs": whole.runs + extra, "claims": [claim]}))[0]
    assert finding.method.setting["kappa"] == 0.2 and finding.baseline.setting == {}


def test_the_two_sides_can_be_held_at_different_settings():
    whole = study()
    claim = Claim(
        text="0.2 against 0.8", source="ours", method="bema", baseline="bema", score="valid/loss", claimed=-1,
        at={"kappa": 0.2}, baseline_at={"kappa": 0.5},
    )  # fmt: skip
    finding = compare(whole.model_copy(update={"claims": [claim]}))[0]
    assert (finding.method.setting["kappa"], finding.baseline.setting["kappa"]) == (0.2, 0.5)
    assert finding.difference.value == pytest.approx(0.09)
    assert finding.verdict is Verdict.CONTRADICTED


def test_scores_of_the_test_are_needed_of_the_chosen_settings_only():
    whole = study()
    chosen = chosen_runs(whole)
    assert len(chosen) == len(EFFECT) * len(SEEDS) and {run.setting["kappa"] for run in chosen} == {0.5}
    unseen = [
        run if run in chosen else run.model_copy(update={"scores": {"valid/loss": run.scores["valid/loss"]}})
        for run in whole.runs
    ]
    assert [str(f.difference) for f in compare(whole.model_copy(update={"runs": unseen}))] == [
        str(f.difference) for f in compare(whole)
    ]


def test_figures_hold_settings_fixed():
    whole = study(figures=[])
    better = [run.model_copy(update={"setting": run.setting | {"lr": 2}}) for run in whole.runs]
    worse = [
        run.model_copy(update={"setting": run.setting | {"lr": 1}, "scores": {k: v + 9 for k, v in run.scores.items()}})
        for run in whole.runs
    ]
    figure = Figure(kind="map", caption="", score="test/loss", methods=["bema"], x="kappa", y="eta")

    def shown(runs, at):
        return _table(whole.model_copy(update={"runs": runs}), figure.model_copy(update={"at": at}), "bema")[2]

    assert np.array_equal(shown(better + worse, {"lr": 1}), shown(worse, {}))
    assert np.array_equal(shown(better + worse, {"lr": 2}), shown(better, {}))


def test_maps_are_of_the_runs_that_settings_were_chosen_by():
    """Reported are only few; the method that is subtracted has the same seeds."""
    whole = study(figures=[])
    tuned = [r.model_copy(update={"tuning": True, "seed": r.seed + 100}) for r in whole.runs]
    few = [run for run in whole.runs if run.setting.get("kappa") == 0.5 or run.method != "bema"]
    few = [r.model_copy(update={"scores": {k: v + 5 for k, v in r.scores.items()}}) for r in few]
    for minus in (None, "ema"):
        figure = Figure(kind="map", caption="", score="test/loss", methods=["bema"], x="kappa", y="eta", minus=minus)
        expected = _table(whole, figure, "bema")
        found = _table(whole.model_copy(update={"runs": few + tuned}), figure, "bema")
        assert found[:2] == expected[:2]
        assert np.array_equal(found[2], expected[2], equal_nan=True)


def test_curves_are_of_the_setting_that_another_score_chooses():
    whole = study()
    figure = Figure(kind="curves", caption="", score="test/loss", methods=["bema"])
    by_test, by_valid = (
        _best(whole, figure.model_copy(update={"selected_by": s}), "bema") for s in (None, "valid/loss")
    )
    assert by_test[0].setting["kappa"] == 0.2 and by_valid[0].setting["kappa"] == 0.5


def test_a_study_survives_its_file(tmp_path):
    path = tmp_path / "toy.json"
    save_study(study(), path)
    assert load_study(path) == study()
    assert [p.name for p in tmp_path.iterdir()] == ["toy.json"]


def test_reports_tell_what_was_found(tmp_path):
    page = write_reports([study()], tmp_path).read_text()
    for found in (
        "reproduced",
        "contradicted",
        "not seen",
        "A toy | with a bar",
        "nothing &lt;odd&gt;",
        "python toy.py",
    ):
        assert found in page
    assert page.count("data:image/png;base64,") == 2 and not re.search(r'(src|href)="?https?:', page)
    table = (tmp_path / "toy.md").read_text()
    shown = paired_difference(compare(study())[0].method.scores, compare(study())[0].baseline.scores)
    assert f"{shown.value:+.4f} ± {shown.standard_error:.4f}" in table and "A toy" in table


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"method": "nobody"}, "no run of 'nobody'"),
        ({"score": "test/nothing"}, "has no score 'test/nothing'"),
        ({"selected_by": None}, "give selected_by"),
    ],
)
def test_claims_that_the_runs_cannot_answer(claim, message):
    whole = study()
    with pytest.raises(ValueError, match=message):
        compare(whole.model_copy(update={"claims": [whole.claims[0].model_copy(update=claim)]}))


@pytest.mark.parametrize(("seeds", "message"), [([0, 1, 2], "same seeds"), ([0, 1, 2, 3, 4, 4], "same seed")])
def test_runs_that_cannot_be_paired(seeds, message):
    runs = [Run(method="ema", setting={}, seed=seed, scores={"loss": 1.0}) for seed in SEEDS]
    runs += [Run(method="bema", setting={}, seed=seed, scores={"loss": 1.0}) for seed in seeds]
    claim = Claim(text="", source="ours", method="bema", baseline="ema", score="loss", claimed=-1)
    with pytest.raises(ValueError, match=message):
        compare(study(runs=runs, claims=[claim]))


def remove_title(document):
    del document["title"]


def add_a_field(document):
    document["colour"] = "red"


def remove_a_seed(document):
    del document["runs"][0]["seed"]


@pytest.mark.parametrize("damage", [remove_title, add_a_field, remove_a_seed])
def test_a_damaged_study_is_refused(tmp_path, damage):
    path = tmp_path / "toy.json"
    save_study(study(), path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="toy.json"):
        load_study(path)


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    runner = CliRunner()
    nothing = runner.invoke(app, ["report"])
    assert isinstance(nothing.exception, ValueError) and "experiments/results" in str(nothing.exception)
    save_study(study(), tmp_path / "experiments" / "results" / "toy.json")
    assert runner.invoke(app, ["report", "-o", "out"]).exit_code == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "toy.md"}


def test_the_documented_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "experiments-report.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    exec(code, {})
    assert capsys.readouterr().out.strip() == re.search(r"# (reproduced .*)", code).group(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"name": "\xff"}', "is no text in UTF-8 .byte 10 is 0xff"),
        (b"[" * 5000, "Invalid JSON"),
        (b'{"seconds": true}', "seconds: true and false are no numbers"),
        (b'{"titel": 1}', "titel: Extra inputs are not permitted; did you mean title"),
        (b'{"seconds": NaN}', "seconds"),
        (b"", "Invalid JSON"),
    ],
)
def test_what_is_no_study_is_named(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken.json: .*{message}|broken.json: .*problems") as caught:
        load_study(path)
    assert "\n" not in str(caught.value)
    if b"NaN" not in content and b"titel" not in content:
        assert re.search(message, str(caught.value))
