"""A quadratic model of the loss of averages, learned from values and slopes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_INDEPENDENT, _CONVEX = 1e-8, 1e-2


class QuadraticModel:
    """A quadratic model of the loss in the weights on checkpoints, around the best combination seen.

    With w* that combination, s_k = w_k - w* the steps to the others and y_k the differences of their gradients,

        m(w) = L + g·(w - w*) + ½ (w - w*)ᵀ H (w - w*)
        H    = B - B Sᵀ (S B Sᵀ)⁺ S B + Yᵀ M⁺ Y        B = h·Gram        M = ½ (S Yᵀ + Y Sᵀ)

    which is BFGS for all pairs at once, starting from one curvature h in every direction of parameter space. It is
    exact on the span of the steps where the loss is quadratic.

    Args:
        gram: <θ_i - θ_N, θ_j - θ_N>, shape (N, N).

    Reference:
        R. B. Schnabel, Quasi-Newton methods using multiple secant equations, CU-CS-247-83, University of Colorado
        (1983).
    """

    def __init__(self, gram: Floats) -> None:
        self._gram = gram
        self._seen: list[tuple[Floats, float, Floats]] = []

    def add(self, weights: Floats, loss: float, slopes: Floats) -> None:
        """Learn the loss and its gradient at ``weights``."""
        self._seen.append((weights, loss, slopes))

    def expansion(self) -> tuple[Floats, float, Floats, Floats]:
        """Return w*, L, g and H of the model."""
        best, loss, slopes = min(self._seen, key=lambda seen: seen[1])
        return best, loss, slopes, self._hessian(best, slopes)

    def predict(self, weights: Floats) -> Floats:
        """The modelled losses of combinations, shape (M, N) → (M,)."""
        best, loss, slopes, hessian = self.expansion()
        moved = weights - best
        return loss + moved @ slopes + 0.5 * ((moved @ hessian) * moved).sum(axis=1)

    def _hessian(self, best: Floats, slopes: Floats) -> Floats:
        others = [seen for seen in self._seen if seen[0] is not best]
        if not others:
            return self._gram
        steps = np.array([weights - best for weights, _, _ in others])
        changes = np.array([other - slopes for _, _, other in others])
        # Steps of unit length that are independent: what differs less is rounding, or not quadratic.
        lengths, mix = np.linalg.eigh(steps @ self._gram @ steps.T)
        kept = lengths > _INDEPENDENT * lengths[-1]
        mix = mix[:, kept] / np.sqrt(lengths[kept])
        steps, changes = mix.T @ steps, mix.T @ changes
        curvatures, axes = np.linalg.eigh((steps @ changes.T + changes @ steps.T) / 2.0)
        if not (curvatures > 0.0).any():
            return self._gram
        typical = float(np.median(curvatures[curvatures > 0.0]))
        convex = curvatures > _CONVEX * typical  # where the loss is not convex, the typical curvature stands in
        steps, changes = axes[:, convex].T @ steps, axes[:, convex].T @ changes
        ahead = typical * steps @ self._gram
        return (
            typical * self._gram
            - ahead.T @ np.linalg.pinv(ahead @ steps.T) @ ahead
            + changes.T @ (changes / curvatures[convex, None])
        )
