"""A trainer that only writes checkpoints: slowly, with rotation, crashes and rollbacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tests.model_files import State, make_state, save_model

from lagless import BEMA, DEMA, EMA, UniformAverage, WindowAverage
from lagless.watch import Settings, Watch

RULES = {
    "ema": EMA(half_life_fraction=0.1),
    "bema": BEMA(),
    "dema": DEMA(),
    "uniform": UniformAverage(),
    "window": WindowAverage(window=3),
}
QUICK = Settings(settle=0.0, patience=0.0)


def save(run: Path, step: int, state: State | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """One checkpoint, with a configuration; its weights follow from the step unless given."""
    folder = run / f"checkpoint-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    save_model(make_state(step, dtype) if state is None else state, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    return folder


def settle(watch: Watch) -> None:
    """Look until there is nothing to do."""
    for _ in range(200):
        if not watch.step():
            return
    raise AssertionError("the watch does not come to rest")


def taken(watch: Watch) -> list[int]:
    """The steps in the averages."""
    return watch.averages.record.steps
