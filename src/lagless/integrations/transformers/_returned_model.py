"""A record beside every model that the Trainer saves after training, of the average that it is.

``Trainer.save_model`` raises no event in which a callback could write it, so the Trainer's method is preceded by one of
the same name on the object itself, until the next training begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import Trainer

from lagless.averaging import unwrap
from lagless.checkpoints import RECORD
from lagless.execution import local
from lagless.integrations._exports import as_text


def record_saves(trainer: Trainer, record: dict[str, Any]) -> None:
    """Have ``trainer.save_model`` write ``lagless.json`` as long as its model holds what it holds now.

    Once it holds other weights, an earlier record in the folder is removed instead.

    Args:
        trainer: after training.
        record: what the model is.
    """
    forget_record(trainer)
    model = unwrap(trainer.accelerator.unwrap_model(trainer.model))
    held, save = _digest(model), trainer.save_model

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        save(output_dir, _internal_call=_internal_call)
        if trainer.args.should_save:
            path = Path(output_dir or trainer.args.output_dir or ".", RECORD)
            if _digest(model) == held:
                path.write_text(as_text({**record, "saved_by": "Trainer.save_model"}), encoding="utf-8")
            elif path.is_file():
                path.unlink()

    trainer.save_model = save_model


def forget_record(trainer: Trainer) -> None:
    """Give the Trainer its own method back."""
    vars(trainer).pop("save_model", None)


def _digest(model: nn.Module) -> str:
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        part = local(parameter).contiguous().cpu()
        digest.update(name.encode())
        if part.numel():
            bits: Any = part.view(-1).view(torch.uint8).numpy()
            digest.update(bits)
    return digest.hexdigest()
