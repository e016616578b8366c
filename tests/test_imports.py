"""What importing lagless loads, and what it leaves for later."""

import subprocess
import sys

import pytest

LATER = ("checkpoints", "posthoc", "lab", "theory", "optim", "integrations", "testing", "cli")
HEAVY = ("transformers", "trl", "lightning", "matplotlib", "pydantic", "typer", "optuna", "scipy", "safetensors")


def loaded(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import lagless",
        "import lagless; lagless.Averager",
        "import torch, lagless; a = lagless.Averager(torch.nn.Linear(2, 2), lagless.EMA()); a.update(); a.read(); "
        "a.load_state_dict(a.state_dict())",
    ],
)
def test_averaging_loads_its_own_rooms_only(code):
    modules = loaded(code)
    assert not {f"lagless.{room}" for room in LATER} & modules
    assert not set(HEAVY) & modules
    assert "lagless.rules" in modules


def test_import_alone_loads_no_torch():
    assert "torch" not in loaded(
        "import lagless; lagless.BEMA.paper(); lagless.trajectory_weights(lagless.EMA(), range(9))"
    )


def test_files_load_checkpoints_when_asked_for(tmp_path):
    code = f"""
from lagless import Averager, EMA
import torch
averager = Averager(torch.nn.Linear(2, 2), EMA())
averager.save({str(tmp_path / "state")!r})
averager.load({str(tmp_path / "state")!r})
"""
    assert "lagless.checkpoints" in loaded(code)
