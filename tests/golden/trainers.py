"""A run of Lightning's Trainer whose gradients are stored arrays, for the golden files of trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .cases import FILES, MODEL_RULES, SHAPES, weights_at
from .names import AveragingCallback

LIGHTNING = FILES / "lightning.ckpt"


class Module(pl.LightningModule):
    """The run's parameters, stepped by SGD with the stored gradients."""

    def __init__(self) -> None:
        super().__init__()
        names = {name.replace(".", "_"): value for name, value in weights_at(0, torch.float32).items()}
        self.weights = nn.ParameterDict(names)
        stored = load_file(FILES / "run.safetensors")
        self.gradients = {name.replace(".", "_"): stored[f"gradients/{name}"][:, 0] for name in SHAPES}

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return torch.stack(
            [(self.weights[name] * g[self.global_step]).sum() for name, g in self.gradients.items()]
        ).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def fit(folder: Path, last: int, checkpoint: Path | None = None) -> tuple[pl.Trainer, Module, Any]:
    """Train up to step ``last``, from the start or from a checkpoint; an epoch is one step."""
    callback, module = AveragingCallback(MODEL_RULES, export=False), Module()
    trainer = pl.Trainer(
        max_steps=last,
        max_epochs=-1,
        log_every_n_steps=1,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader([0]), ckpt_path=checkpoint, weights_only=True)
    return trainer, module, callback.averager
