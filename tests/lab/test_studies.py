"""Studies stand alone: they import what is public and what they share, never each other; all of them load."""

import ast
import importlib
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDIES = sorted((EXPERIMENTS / "studies").glob("*.py"))
SHARED = sorted((EXPERIMENTS / "shared").glob("*.py"))


def imported(source):
    """The dotted names that a module's source imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def forbidden(source):
    """Imports of another study, relative ones, and private names of lagless or of what studies share."""
    stems = {path.stem for path in STUDIES}
    for name in imported(source):
        root, *parts = name.split(".")
        ours = root in ("lagless", "experiments")
        if root in ("", *stems) or name.startswith("experiments.studies") or (ours and any(p[0] == "_" for p in parts)):
            yield name


def test_there_are_studies():
    assert len(STUDIES) > 5 and SHARED


@pytest.mark.parametrize("path", [*STUDIES, *SHARED], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_study_imports_nothing_private_and_no_other_study(path):
    assert list(forbidden(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "from experiments.studies.pace import METHODS",
        "import pace",
        "from . import pace",
        "from lagless.rules._filter import trajectory_weights",
        "from experiments.shared.bench import _name",
        "def f():\n    from lagless.lab import _private",
    ],
)
def test_what_is_forbidden_is_seen(line):
    assert list(forbidden(line))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_loads(path):
    for package in ("datasets", "lm_eval", "optuna", "trl"):
        pytest.importorskip(package)
    importlib.import_module(f"experiments.studies.{path.stem}")
