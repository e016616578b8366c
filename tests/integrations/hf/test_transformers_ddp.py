"""AveragingCallback on two ranks under DDP."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from ...processes import launch, run_script


def test_ranks_agree_and_one_of_them_writes(hf, tmp_path):
    """Each rank has checked its model, which is the best average, against the weights that it saw."""
    for rank in launch(run_script, 2, Path(__file__).with_name("ddp_run.py"), tmp_path):
        assert rank.exitcode == 0, rank.output[-3000:]
    first, second = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert hf.same(first, second)
    exported = load_file(tmp_path / "averaged/ema/model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in first.items())
    assert not list(tmp_path.rglob(".*"))
