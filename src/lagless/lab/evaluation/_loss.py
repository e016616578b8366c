"""Cross-entropy on fixed held-out sequences, kept sequence by sequence so that models can be compared in pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lagless.lab.cross_entropy import sequence_nats
from lagless.lab.statistics import Mean


@dataclass(frozen=True)
class Sequences:
    """Held-out sequences, the same ones for every model.

    Attributes:
        tokens: (N, length), padded on the right; what comes after a position has no effect on it in a causal model, so
            padding needs no mask.
        labels: (N, length), the tokens that count, -100 elsewhere.
    """

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Losses:
    """The loss of one model on each of N sequences.

    Attributes:
        nats: (N,), float64, cross-entropy summed over the targets of a sequence.
        targets: (N,), how many there are.
    """

    nats: Tensor
    targets: Tensor

    @property
    def mean(self) -> Mean:
        """Nats per token with its standard error over sequences."""
        return _per_token(self.nats, self.targets)

    def difference(self, reference: Losses) -> Mean:
        """This loss minus the ``reference``'s, nats per token, with the standard error of the pairs.

        Both are on the same sequences, so that what makes a sequence hard cancels.

        Raises:
            ValueError: if they are not on the same sequences.
        """
        if not torch.equal(self.targets, reference.targets):
            raise ValueError("losses: the two are not on the same sequences; evaluate both models on the same ones.")
        return _per_token(self.nats - reference.nats, self.targets)


def sequence_losses(model: nn.Module, sequences: Sequences, batch_size: int = 8) -> Losses:
    """The loss of ``model`` on every sequence.

    Args:
        model: a causal model of ``transformers``.
        sequences: N sequences.
        batch_size: sequences at a time. The default keeps the logits of small models in cache.
    """
    return Losses(*sequence_nats(model, sequences.tokens, sequences.labels, batch_size))


def _per_token(nats: Tensor, targets: Tensor) -> Mean:
    """Σ nats / Σ targets; of a ratio se² = N/(N-1) Σ (nats_i - mean·targets_i)² / (Σ targets)²."""
    n, total = len(nats), float(targets.sum())
    mean = float(nats.sum()) / total
    residuals = nats - mean * targets
    spread = math.sqrt(float(residuals.square().sum()) * n / (n - 1)) / total if n > 1 else math.nan
    return Mean(mean, spread, n)
