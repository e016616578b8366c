"""Averages written as models that load without lagless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lagless.integrations.lightning._imports import LightningModule, Trainer
from lagless.posthoc.destination import Destination


def export(trainer: Trainer, module: LightningModule, folder: Path, name: str) -> None:
    """Write the weights that are in ``module`` now, on every rank alike.

    ``{folder}/{name}.ckpt`` is for ``load_from_checkpoint`` and ``ckpt_path``. Where the module holds a trainable model
    with ``save_pretrained``, ``{folder}/{name}`` is for its ``from_pretrained``, tokenizer included; of several models
    each has a folder in it, named as the attribute.
    """
    trainer.save_checkpoint(folder / f"{name}.ckpt", weights_only=True)
    models = _pretrained(module)
    if models and trainer.is_global_zero:
        with Destination(folder / name) as destination:
            for path, model in models.items():
                model.save_pretrained(destination if len(models) == 1 else destination / path)
            if len(models) == 1:
                for processor in _processors(module, trainer):
                    processor.save_pretrained(destination)
    trainer.strategy.barrier("lagless.export")


def _pretrained(module: nn.Module, path: str = "") -> dict[str, Any]:
    """The outermost trainable models that know how to save themselves."""
    if hasattr(module, "save_pretrained"):
        return {path: module} if any(p.requires_grad for p in module.parameters()) else {}
    inside = (_pretrained(child, f"{path}.{key}" if path else key) for key, child in module.named_children())
    return {path: model for found in inside for path, model in found.items()}


def _processors(module: LightningModule, trainer: Trainer) -> list[Any]:
    owners = module, getattr(trainer, "datamodule", None)
    found = [getattr(owner, key, None) for key in ("tokenizer", "processor") for owner in owners]
    return [processor for processor in found if hasattr(processor, "save_pretrained")]
