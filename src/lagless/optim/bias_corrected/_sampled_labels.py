"""Labels that a model samples itself, whose loss estimates curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sampled_label_loss(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, generator: torch.Generator | None = None
) -> Tensor:
    """Mean cross-entropy of next tokens that the model samples itself, where ``labels`` supervise one.

    Its gradient q makes mean q² · batch size the Gauss-Newton-Bartlett estimate of the diagonal curvature.

    Args:
        logits: of the next token, shape (batch, length, vocabulary); the last position's are not used.
        labels: shape (batch, length), not shifted, ``ignore_index`` where there is no supervision.
        ignore_index: as in the true loss.
        generator: of the samples.
    """
    logits, supervised = logits[:, :-1].float(), labels[:, 1:] != ignore_index
    logits = logits[supervised]
    probabilities = logits.detach().softmax(dim=-1)
    sampled = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return nn.functional.cross_entropy(logits, sampled)
