"""The loss of an average and its slopes in the weights of the checkpoints, by one backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lagless.lab.averages import State, load_weights, weighted_sum
from lagless.lab.cross_entropy import IGNORED, cross_entropy_by_sequence
from lagless.lab.evaluation import Sequences

Floats = NDArray[np.float64]


class AverageLoss:
    """The loss of combinations of held checkpoints as a function of their weights, with its gradient.

    Args:
        model: what the combinations are loaded into.
        states: N checkpoints.
        sequences: what the loss is measured on.
        batch_size: sequences at a time.
    """

    def __init__(self, model: nn.Module, states: Sequence[State], sequences: Sequences, batch_size: int = 8) -> None:
        self._model, self._states, self._sequences, self._batch_size = model, states, sequences, batch_size
        parameters = dict(model.named_parameters(remove_duplicate=False))
        once = {id(parameters[name]): name for name in states[-1] if name in parameters}  # tied ones count once
        self._parameters = {name: parameters[name] for name in once.values()}

    def load(self, weights: Floats) -> None:
        """Put Σ_i w_i θ_i into the model."""
        load_weights(self._model, weighted_sum(self._states, weights))

    def __call__(self, weights: Floats) -> tuple[float, Floats]:
        """L(θ(w)) in nats per token, and ∂L/∂w_i = <∇L, θ_i>, shape (N,)."""
        self.load(weights)
        tokens, labels = self._sequences.tokens, self._sequences.labels
        targets = float((labels[:, 1:] != IGNORED).sum())
        self._model.zero_grad(set_to_none=True)
        total = 0.0
        for nats, _ in cross_entropy_by_sequence(self._model, tokens, labels, self._batch_size):
            part = nats.sum() / targets
            part.backward()
            total += float(part.detach())
        slopes = np.zeros(len(self._states))
        for name, parameter in self._parameters.items():
            if (gradient := parameter.grad) is not None:
                slopes += [float((gradient * state[name].to(gradient.device)).sum()) for state in self._states]
        self._model.zero_grad(set_to_none=True)
        return total, slopes

    def gram(self) -> Floats:
        """<θ_i - θ_N, θ_j - θ_N>, shape (N, N)."""
        total = np.zeros((len(self._states), len(self._states)))
        for name in self._parameters:
            moved = torch.stack([(state[name] - self._states[-1][name]).flatten() for state in self._states])
            total += (moved @ moved.T).double().numpy()
        return total
