"""Loss on held-out text, differences between two models on it, and samples of text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lagless.lab.cross_entropy import sequence_nats
from lagless.lab.demo._results import Difference

_BATCH = 8  # logits that fit a cache


@dataclass(frozen=True)
class HeldOut:
    """Text that no step of training sees.

    Attributes:
        tokens: (N, length), non-overlapping sequences.
        files: (N,), the number of the file that each comes from.
    """

    tokens: Tensor
    files: Tensor


def sequence_losses(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of each sequence, in nats per token: (N, length) → (N,), float64."""
    nats, targets = sequence_nats(model, tokens, tokens, _BATCH)
    return nats / targets


def paired_difference(losses: Tensor, reference: Tensor, files: Tensor) -> Difference:
    """The mean of ``losses - reference`` and its standard error, clustered by file.

    Both are on the same sequences, so that what makes a sequence hard cancels. Sequences of one file resemble each
    other, so files are what counts as drawn at random:

        se² = G/(G-1) · Σ_g (Σ_{i in g} (d_i - d̄))² / N²        with G files and N sequences.
    """
    difference = losses - reference
    mean = difference.mean()
    sums = torch.zeros(int(files.max()) + 1, dtype=torch.float64).index_add_(0, files, difference - mean)
    groups = len(files.unique())
    variance = sums.square().sum() / len(files) ** 2 * groups / max(1, groups - 1)
    return Difference(float(mean), float(variance.sqrt()))


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompt: Tensor, count: int, length: int, seed: int) -> Tensor:
    """``count`` tokens that continue ``prompt`` (n,), drawn at temperature 0.8; the same random numbers for any model.

    Args:
        model: the model.
        prompt: (n,), the tokens to start from.
        count: how many to add.
        length: how many of the last tokens the model is shown.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(count):
        logits = model(input_ids=tokens[None, -length:], use_cache=False).logits[0, -1]
        chosen = torch.multinomial((logits / 0.8).softmax(dim=0), 1, generator=generator)
        tokens = torch.cat([tokens, chosen])
    return tokens[len(prompt) :]
