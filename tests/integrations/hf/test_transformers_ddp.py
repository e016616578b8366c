"""AveragingCallback on two ranks under DDP."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def test_ranks_agree_and_one_of_them_writes(hf, tmp_path):
    """Each rank has checked its model, which is the best average, against the weights that it saw."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("ddp_run.py")
    done = subprocess.run([*launcher, script, tmp_path], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert hf.same(first, second)
    exported = load_file(tmp_path / "averaged/ema/model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in first.items())
    assert not list(tmp_path.rglob(".*"))
