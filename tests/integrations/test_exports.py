"""Exports replace and remove what lagless wrote, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lagless import EMA, Averager
from lagless.checkpoints import CheckpointError
from lagless.integrations._exports import describe, export_folder, remove_export


@pytest.fixture
def averager() -> Averager:
    averager = Averager({"w": torch.ones(2)}, EMA(decay=0.5))
    averager.update()
    return averager


def _export(out: Path, averager: Averager) -> None:
    with export_folder(out, describe(averager, "ema")) as temporary:
        (temporary / "model.safetensors").write_text("weights")
        (temporary / "deep").mkdir()
        (temporary / "deep" / "tokenizer.json").write_text("{}")


def test_an_export_is_removed_with_all_that_is_in_it(tmp_path: Path, averager: Averager) -> None:
    _export(tmp_path / "ema", averager)
    _export(tmp_path / "ema", averager)
    remove_export(tmp_path / "ema")
    remove_export(tmp_path / "ema")
    assert list(tmp_path.iterdir()) == []


def test_files_of_somebody_else_stay(tmp_path: Path, averager: Averager) -> None:
    _export(tmp_path / "ema", averager)
    for name in ("eval_results.json", "deep/notes.txt"):
        (tmp_path / "ema" / name).write_text("mine")
    with pytest.raises(CheckpointError, match="did not write deep/notes.txt, eval_results.json in it"):
        _export(tmp_path / "ema", averager)
    assert (tmp_path / "ema" / "model.safetensors").is_file()
    remove_export(tmp_path / "ema")
    left = {path.relative_to(tmp_path / "ema").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"eval_results.json", "deep/notes.txt"}
    remove_export(tmp_path / "ema")
    assert len(list(tmp_path.rglob("*"))) == 4


def test_a_folder_without_a_record_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "model.safetensors").touch()
    remove_export(tmp_path / "ema")
    assert (tmp_path / "ema" / "model.safetensors").exists()
