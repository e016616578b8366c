"""What commands say about runs whose averages are not what one may expect."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lagless.checkpoints import find_checkpoints
from lagless.cli import main
from lagless.posthoc import factors_note

LAYER = "base_model.model.layers.{}.q_proj.lora_{}.weight"


def make(folder: Path, names: list[str]) -> Path:
    for step in (10, 20):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        state = {name: torch.randn(2, 2) for name in names}
        save_file(state, folder / f"checkpoint-{step}/adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "names, layers",
    [
        ([LAYER.format(i, factor) for i in range(3) for factor in "AB"], 3),
        (["embed.lora_embedding_A", "embed.lora_embedding_B", "head.weight"], 1),
        ([LAYER.format(0, "A"), LAYER.format(1, "B")], 0),  # the other factor is frozen: exact
        (["a.vera_lambda", "lora_A_like.weight"], 0),
    ],
)
def test_factors_averaged_apart_are_counted(tmp_path: Path, names: list[str], layers: int) -> None:
    note = factors_note(find_checkpoints(make(tmp_path, names)))
    assert (note is None) == (layers == 0)
    assert note is None or f"A and B of {layers} LoRA layers are averaged apart" in note


def test_commands_say_that_factors_are_averaged_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "run", [LAYER.format(0, factor) for factor in "AB"])
    for command in (["inspect", run], ["average", run, "-o", tmp_path / "out", "--rule", "ema", "--half-life", "9"]):
        monkeypatch.setattr(sys, "argv", ["lagless", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "note: A and B of 1 LoRA layers are averaged apart" in printed and "merged_lora=True" in printed
