"""Train a language model and keep its iterates as the rows of one float32 matrix."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from experiments.shared.attention import use_small_heads
from experiments.shared.text import random_windows
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Setting:
    """Everything that decides a run but the data and the initial model.

    Attributes:
        optimizer: ``"adamw"`` (β 0.9, 0.999, no weight decay) or ``"sgd"`` with momentum 0.9.
        rate: peak learning rate.
        final: the learning rate at the end as a share of the peak, reached linearly; 1 is a constant rate.
        batch: sequences per step.
        seed: of the order of the data.
        steps: optimizer steps.
        warmup: steps over which the rate rises linearly to the peak.
        every: steps between stored iterates.
        length: tokens of a sequence.
    """

    optimizer: Literal["adamw", "sgd"]
    rate: float
    final: float
    batch: int
    seed: int
    steps: int = 7200
    warmup: int = 50
    every: int = 100
    length: int = 128

    @property
    def schedule(self) -> str:
        """Name of the learning-rate schedule."""
        return "constant" if self.final == 1.0 else f"linear-to-{self.final:g}"

    @property
    def name(self) -> str:
        """Unique among the runs of a study."""
        text = f"{self.optimizer}-lr{self.rate:g}-{self.schedule}-b{self.batch}-s{self.seed}"
        return text if self.steps == 7200 else f"{text}-T{self.steps}"

    def rate_at(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, the first being 1."""
        decay = 1.0 - (1.0 - self.final) * (step - 1) / self.steps
        return self.rate * min(1.0, step / self.warmup) * decay


def load_model(folder: Path) -> PreTrainedModel:
    """Load a Llama in float32 with ``attention.attention``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    use_small_heads(model)
    return model


def flat(model: torch.nn.Module) -> np.ndarray:
    """Return the parameters as one float32 vector, tied ones once."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()


def token_losses(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a compiled function from windows (n, length + 1) to the nats of their predicted tokens (n, length)."""

    def losses(windows: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)

    return torch.compile(losses)


def train(model: PreTrainedModel, setting: Setting, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Train from the model's weights.

    Returns:
        The iterates, shape (steps / every + 1, parameters), the first being the initial weights; and what is to be
        remembered of the run: its mean training loss and gradient norm over every stretch between two iterates.

    Raises:
        FloatingPointError: if the loss of a stretch is not finite.
    """
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer
    if setting.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=setting.rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    else:
        optimizer = torch.optim.SGD(parameters, lr=setting.rate, momentum=0.9, fused=True)
    starts = random_windows(tokens, setting.seed, setting.steps, setting.batch, setting.length)
    offsets = np.arange(setting.length + 1)
    losses = token_losses(model)
    iterates = np.empty((setting.steps // setting.every + 1, sum(p.numel() for p in parameters)), dtype=np.float32)
    iterates[0] = flat(model)
    curve: list[float] = []
    norms: list[float] = []
    loss_sum = norm_sum = 0.0
    begun, cpu = time.monotonic(), time.process_time()
    for step in range(1, setting.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = setting.rate_at(step)
        windows = torch.from_numpy(tokens[starts[step - 1][:, None] + offsets].astype(np.int64))
        loss = losses(windows).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum, norm_sum = loss_sum + loss.item(), norm_sum + norm.item()
        if step % setting.every == 0:
            if not math.isfinite(loss_sum):
                raise FloatingPointError(f"{setting.name}: the loss is {loss_sum} before step {step}.")
            iterates[step // setting.every] = flat(model)
            curve.append(round(loss_sum / setting.every, 5))
            norms.append(round(norm_sum / setting.every, 5))
            loss_sum = norm_sum = 0.0
    seconds = {"seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    return iterates, {"training_loss": curve, "gradient_norm": norms, "attention": "small heads", **seconds}
