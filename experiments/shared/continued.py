"""Fields of a recipe that goes on from a model trained for some steps, and of the training of that model."""

from __future__ import annotations

from typing import Any

from experiments.shared.passages import LLAMA

START_STEPS, STEPS, WARMUP, FOLDS = 300, 100, 20, 4

START: dict[str, Any] = {
    "model.config": LLAMA,
    "data.sequence_length": 64,
    "method.optimizer": {"kind": "adamw"},
    "method.schedule": {"kind": "constant", "warmup_steps": WARMUP},
    "training.max_steps": START_STEPS,
    "training.batch_size": 8,
    "training.micro_batch_size": 8,
    "training.evaluation_batch_size": 100,
    "training.save_every": START_STEPS,
    "evaluation.sequences": 400,
    "evaluation.every": START_STEPS,
}
COMMON: dict[str, Any] = {
    "data.sequence_length": 64,
    "method.schedule": {"kind": "cosine", "warmup_steps": WARMUP},
    "training.max_steps": STEPS,
    "training.batch_size": 8,
    "training.micro_batch_size": 8 // FOLDS,
    "training.evaluation_batch_size": 100,
    "training.log_every": STEPS,
    "training.save_every": STEPS,
    "evaluation.sequences": 400,
    "evaluation.every": STEPS,
}
