from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

SHAPES = {"embed.weight": (37, 5), "norm.weight": (5,), "scale": (), "nothing": (0, 3), "mlp.weight": (300, 9)}


def make_state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return state | {"position": torch.arange(7) + seed, "mask": torch.tensor([True, False, bool(seed % 2)])}


def save_sharded(state: State, folder: Path, shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(state)}
    for file in names:
        save_file({t: state[t] for t, f in weight_map.items() if f == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_model(state: State, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes checkpoint-N folders for the given states, at steps 10, 20, ... unless told otherwise."""

    def make(states: Sequence[State], steps: Sequence[int] | None = None, name: str = "run") -> Path:
        for i, state in enumerate(states):
            folder = tmp_path / name / f"checkpoint-{steps[i] if steps else 10 * (i + 1)}"
            save_model(state, folder)
            (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
            (folder / "optimizer.pt").write_bytes(b"large")
        return tmp_path / name

    return make


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
