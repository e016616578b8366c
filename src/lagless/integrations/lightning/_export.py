"""Averages written as models that load without lagless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lagless.averaging import HoldsAverages
from lagless.checkpoints import RECORD, CheckpointError, check_destination
from lagless.integrations._exports import base_model_name, describe, export_folder, remove_export
from lagless.integrations.lightning._compat import LightningModule, Trainer


def export(trainer: Trainer, module: LightningModule, holder: HoldsAverages, folder: Path, name: str) -> None:
    """Write the average ``name``, which is in the module now, on every rank alike.

    ``{folder}/{name}.ckpt`` is for ``load_from_checkpoint`` and ``ckpt_path``. ``{folder}/{name}`` has a record of what
    it is. Where the module holds a trainable model with ``save_pretrained``, that folder is for its
    ``from_pretrained``, tokenizer included; of several models each has a folder in it, named as the attribute.

    Raises:
        CheckpointError: if something is in the way.
    """
    if trainer.is_global_zero:
        check_export(folder, name)
        models = _pretrained(module)
        base = base_model_name(next(iter(models.values()))) if len(models) == 1 else None
        with export_folder(folder / name, describe(holder, name), base) as temporary:
            for path, model in models.items():
                model.save_pretrained(temporary if len(models) == 1 else temporary / path)
            if len(models) == 1:
                for processor in _processors(module, trainer):
                    processor.save_pretrained(temporary)
    trainer.save_checkpoint(_checkpoint(folder, name), weights_only=True)


def check_export(folder: Path, name: str) -> None:
    """Refuse to replace anything but an earlier export.

    Raises:
        CheckpointError: if something else is in the way.
    """
    check_destination(folder / name, [], overwrite=True)
    checkpoint = _checkpoint(folder, name)
    if checkpoint.exists() and not _record(folder, name).is_file():
        raise CheckpointError(
            f"{checkpoint}: would be replaced, and lagless did not write it. Choose another folder with export, or "
            "remove it yourself."
        )


def withdraw(folder: Path, name: str) -> None:
    """Remove an earlier export of the average ``name``, which would be taken for this run's; anything else stays."""
    if _record(folder, name).is_file():
        _checkpoint(folder, name).unlink(missing_ok=True)
        remove_export(folder / name)


def _checkpoint(folder: Path, name: str) -> Path:
    return folder / f"{name}.ckpt"


def _record(folder: Path, name: str) -> Path:
    return folder / name / RECORD


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
