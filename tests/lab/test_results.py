"""The results in the repository load, and the report is made of them."""

from pathlib import Path

import pytest

from lagless.lab.report import compare, load_study, write_reports

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "experiments" / "results", ROOT / "experiments" / "archive" / "results")
RESULTS = [path for folder in FOLDERS for path in sorted(folder.glob("*.json"))]
SEEDS = 5
MOST_BYTES = 600_000


def test_there_are_results():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_study_of_the_repository(path):
    study = load_study(path)
    assert study.name == path.stem and study.claims and path.stat().st_size < MOST_BYTES
    for finding in compare(study):
        assert finding.difference.n >= SEEDS
    for command in study.commands:
        script = next((word for word in command.split() if word.startswith("experiments/studies/")), None)
        assert script is None or (ROOT / script).is_file()
        module = next((word for word in command.split() if word.startswith("experiments.studies.")), None)
        assert module is None or (ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert not any(word.startswith(("/", "~")) for word in command.split()), command  # no machine's paths


def test_the_report_is_made_of_them(tmp_path):
    studies = [load_study(path) for path in RESULTS]
    page = write_reports(studies, tmp_path).read_text(encoding="utf-8")
    for study in studies:
        assert f"id='{study.name}'" in page and (tmp_path / f"{study.name}.md").is_file()
    assert page.count("data:image/png;base64,") == sum(len(study.figures) for study in studies)
