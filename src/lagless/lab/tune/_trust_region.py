"""How far from what was evaluated a model of the loss is believed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_POOR, _GOOD = 0.25, 0.75  # of the promised gain


class TrustRegion:
    """The combinations of checkpoints within a radius of the best one seen, in parameter space.

        |θ(w) - θ(w*)| ≤ ρ

    It begins with the largest distance between combinations that were evaluated: up to there the model interpolates.
    Where an evaluation keeps less than a quarter of what the model promised, ρ is halved; where it keeps more than
    three quarters, doubled.

    Args:
        gram: <θ_i - θ_N, θ_j - θ_N>, shape (N, N).
        evaluated: shape (M, N), M ≥ 2.

    Reference:
        J. Nocedal, S. J. Wright, Numerical Optimization (2006), Algorithm 4.1.
    """

    def __init__(self, gram: Floats, evaluated: Floats) -> None:
        self._gram = gram
        self.radius = max(float(self._distances(evaluated, row).max()) for row in evaluated)

    def holds(self, weights: Floats, best: Floats) -> NDArray[np.bool_]:
        """Whether each of M combinations lies within the radius of ``best``, shape (M, N) → (M,)."""
        return self._distances(weights, best) <= self.radius * (1.0 + 1e-9)

    def adapt(self, gained: float, promised: float) -> None:
        """Learn what an evaluation gained on the best loss before, and what the model had promised."""
        if gained < _POOR * promised:
            self.radius /= 2.0
        elif gained > _GOOD * promised:
            self.radius *= 2.0

    def _distances(self, weights: Floats, centre: Floats) -> Floats:
        moved = weights - centre
        return np.sqrt(np.maximum(((moved @ self._gram) * moved).sum(axis=1), 0.0))
