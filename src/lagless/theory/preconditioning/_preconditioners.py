"""Adam's update and its bias-corrected forms for numpy arrays of microbatch gradients.

The formulas are those that the optimizers step with (:mod:`lagless.updates`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from lagless import updates
from lagless.rules import FloatArray
from lagless.updates import CrossFit, EmaWeights


class Moments(NamedTuple):
    """Adam's two running averages before bias correction; numbers or arrays of one shape."""

    m: FloatArray
    v: FloatArray


class Folds(NamedTuple):
    """An update as a mean of products; each array has shape (folds, *gradient shape).

    Attributes:
        numerator: m̂ of each fold.
        inverse: what it is multiplied by, 1/(√v̂ + ε) less its correction.
        second_moment: v̂ of each fold.
    """

    numerator: FloatArray
    inverse: FloatArray
    second_moment: FloatArray

    @property
    def update(self) -> FloatArray:
        """u, the mean over folds of numerator × inverse."""
        return (self.numerator * self.inverse).mean(axis=0)


class UpdateEstimator(Protocol):
    """A way to form an update from microbatch gradients; its state before a step is whatever it likes.

    Attributes:
        cross_fit: which preconditioner it estimates, as for :class:`AdamEstimator`.
    """

    @property
    def cross_fit(self) -> CrossFit:
        """Which preconditioner is estimated."""
        ...

    def start(self, m: FloatArray, v: FloatArray) -> Any:
        """The state before the first step."""
        ...

    def folds(self, gradients: FloatArray, moments: Any, weights: EmaWeights, eps: float = 0.0) -> Folds:
        """The parts of the update."""
        ...

    def absorb(self, gradients: FloatArray, moments: Any, betas: tuple[float, float]) -> Any:
        """The state after this step."""
        ...


@dataclass(frozen=True)
class AdamEstimator(updates.AdamForm):
    """A form of Adam's update, from the gradients of every microbatch of a step.

    Args:
        cross_fit: how numerator and second moment are kept apart: none, split, symmetric or leave_one_out.
        inverse_correction: what is subtracted from the inverse: none, post_ema, pre_ema or jackknife.
        alpha: in [0, 1], for split: the share of B's mean square in the second moment.
        adaptive_alpha: multiply α by the cosine between the two second moments.
        constants: of the corrections.
        two_nodes: for leave_one_out, replace the microbatches by two nodes of the same mean and variance, as an
            optimizer does that does not keep them.

    Raises:
        ValueError: for an unknown name or a correction that ``cross_fit`` does not have.

    The optimizers use the same functions: see :class:`lagless.optim.BiasCorrectedAdamW`.
    """

    two_nodes: bool = False

    def start(self, m: FloatArray, v: FloatArray) -> Moments:
        """The state before the first step."""
        return Moments(m, v)

    def folds(self, gradients: FloatArray, moments: Moments, weights: EmaWeights, eps: float = 0.0) -> Folds:
        """The parts of the update.

        Args:
            gradients: shape (n, ...), one row per microbatch, the first half being A; an even n for split and
                symmetric, n ≥ 2 otherwise.
            moments: m and v before this step, shape (...).
            weights: of old and new in m̂ and v̂, :meth:`EmaWeights.at`.
            eps: ε ≥ 0, outside the root.

        Raises:
            ValueError: if the number of microbatches does not suit, or a half has one of them where a variance is
                asked for.
        """
        self._check_count(len(gradients))
        found = updates.adam_folds(self, self._groups(gradients), _tensors(moments), weights, eps)
        return Folds(*(part.numpy() for part in found[:3]))

    def absorb(self, gradients: FloatArray, moments: Moments, betas: tuple[float, float]) -> Moments:
        """m and v after this step: (1 - β)·new + β·old, new being (ḡ_A, s_B) for split and (ḡ, ḡ²) otherwise."""
        fed = updates.fed_moments(self, self._groups(gradients))
        b1, b2 = betas
        return Moments(
            b1 * moments.m + (1.0 - b1) * fed.m.numpy(),
            b2 * moments.v + (1.0 - b2) * fed.v.numpy(),
        )

    def _check_count(self, n: int) -> None:
        halves = self.cross_fit in ("split", "symmetric")
        plain = self.cross_fit == self.inverse_correction == "none"
        minimum = 1 if plain else 4 if halves and self.inverse_correction != "none" else 2
        if n < minimum or (halves and n % 2):
            raise ValueError(f"{n} microbatches; {self} needs {'an even number ' if halves else ''}>= {minimum}.")

    def _groups(self, gradients: FloatArray) -> list[updates.Group]:
        halves = 2 if self.cross_fit in ("split", "symmetric") else 1
        groups = [updates.Group.of(part) for part in torch.from_numpy(gradients).chunk(halves)]
        if self.two_nodes:
            (g,) = groups
            spread = updates.two_nodes(g.mean, torch.from_numpy(gradients).var(dim=0, correction=0), len(gradients))
            groups = [g._replace(gradients=spread)]
        return groups


def _tensors(moments: Moments) -> updates.Moments:
    return updates.Moments(*(torch.from_numpy(np.asarray(moment)) for moment in moments))
