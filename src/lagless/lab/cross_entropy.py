"""Cross-entropy of a causal language model, sequence by sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100  # what transformers, too, takes for "not a target"


def cross_entropy_by_sequence(
    model: nn.Module, tokens: Tensor, labels: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The nats of each sequence and how many targets they are the sum over, batch by batch, with gradients if enabled.

    The model is in evaluation mode meanwhile, and in its own mode afterwards.

    Args:
        model: a causal model of ``transformers``.
        tokens: (N, length).
        labels: (N, length), the tokens that count, :data:`IGNORED` elsewhere.
        batch_size: sequences at a time.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for inputs, targets in zip(tokens.split(batch_size), labels[:, 1:].split(batch_size), strict=True):
            logits = model(input_ids=inputs.to(device), use_cache=False).logits[:, :-1]
            each = functional.cross_entropy(
                logits.float().transpose(1, 2), targets.to(device), reduction="none", ignore_index=IGNORED
            )
            yield each.double().sum(dim=1).cpu(), (targets != IGNORED).sum(dim=1).cpu()
    finally:
        model.train(was_training)


def sequence_nats(model: nn.Module, tokens: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The nats and the number of targets of every sequence, (N,) each, without gradients."""
    with torch.no_grad():
        nats, targets = zip(*cross_entropy_by_sequence(model, tokens, labels, batch_size), strict=True)
    return torch.cat(nats), torch.cat(targets)
