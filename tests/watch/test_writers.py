"""Trackers get ``eval/NAME/loss``, through their own libraries, here stand-ins that note what they are asked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, call

import pytest

from lagless.watch import Writer
from lagless.watch._writers import WRITERS

ROWS: list[dict[str, Any]] = [
    {"time": 1.0, "step": 10, "name": "ema", "loss": 2.5, "standard_error": 0.1, "n": 8, "seconds": 3.0},
    {"time": 1.0, "step": 10, "name": "ema", "event": "evaluation failed", "text": "no"},
    {"time": 1.0, "step": 20, "name": "live", "loss": None},
]
NUMBERS = {"eval/ema/loss": 2.5, "eval/ema/standard_error": 0.1}


def use(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MagicMock:
    library = MagicMock(spec=ModuleType)
    for name in ("SummaryWriter", "init", "start_run", "log_metrics", "end_run"):
        setattr(library, name, MagicMock())
    monkeypatch.setitem(sys.modules, WRITERS[kind][0], library)
    writer = Writer(kind, tmp_path / "run", tmp_path / "out")
    for row in ROWS:
        writer(row)
    writer.close()
    return library


def test_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = use("tensorboard", monkeypatch, tmp_path)
    library.SummaryWriter.assert_called_once_with(str(tmp_path / "out/tensorboard"))
    made = library.SummaryWriter.return_value
    assert made.add_scalar.mock_calls == [call(name, value, 10) for name, value in NUMBERS.items()]
    made.close.assert_called_once_with()


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = use("wandb", monkeypatch, tmp_path).init.return_value
    run.define_metric.assert_called_with("eval/*", step_metric="train_step")
    run.log.assert_called_once_with(NUMBERS | {"train_step": 10})
    run.finish.assert_called_once_with()


def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = use("mlflow", monkeypatch, tmp_path)
    library.log_metrics.assert_called_once_with(NUMBERS, step=10)
    library.end_run.assert_called_once_with()


def test_trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = use("trackio", monkeypatch, tmp_path).init.return_value
    run.log.assert_called_once_with(NUMBERS, step=10)
    run.finish.assert_called_once_with()


@pytest.mark.parametrize("kind", WRITERS)
def test_a_library_that_is_missing_is_named(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, WRITERS[kind][0], None)
    with pytest.raises(ImportError, match=f"--log {kind} needs {kind}: pip install {kind}"):
        Writer(kind, tmp_path / "run", tmp_path)


def test_other_trackers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--log 'comet'; there are tensorboard, wandb, mlflow, trackio"):
        Writer("comet", tmp_path, tmp_path)
