"""Losses of averaged weights, document by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from experiments.shared.text import HeldOut
from experiments.shared.training import token_losses
from transformers import PreTrainedModel

AT_ONCE = 8  # windows


class Evaluator:
    """Evaluate weight vectors on held-out documents with one model.

    Args:
        model: takes the weights; its own are lost.
        parts: held-out documents by the name of their part; their windows have one length.
    """

    def __init__(self, model: PreTrainedModel, parts: Mapping[str, HeldOut]) -> None:
        self._model, self._losses = model.eval(), token_losses(model)
        self._windows = {name: torch.from_numpy(part.windows.astype(np.int64)) for name, part in parts.items()}

    @torch.no_grad()
    def document_losses(self, weights: np.ndarray, parts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return by part the mean nats per token of every document, shape (documents,), float64."""
        torch.nn.utils.vector_to_parameters(torch.from_numpy(weights), self._model.parameters())
        found = {}
        for part in parts:
            windows = self._windows[part]
            flat = windows.flatten(0, 1)
            means = torch.cat([self._losses(chunk).double().mean(1) for chunk in flat.split(AT_ONCE)])
            found[part] = means.view(windows.shape[:2]).mean(1).numpy()
        return found
