"""Adam's update and its bias-corrected forms, as pure functions of what is known about a step's microbatches.

An update divides a numerator by a preconditioner made from the same gradients. *Cross-fitting* makes the two from
different microbatches; *inverse correction* subtracts what the convexity of 1/x adds on average. Both change an update
into a mean over folds of (numerator × inverse).

Reference: Nayak et al., arXiv 2605.20756.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lagless._validation import check_choice, check_number
from lagless.updates._lerp import lerp
from lagless.updates._linalg import vector_norm
from lagless.updates._spread import Spread, pair

CrossFit = Literal["none", "split", "symmetric", "leave_one_out"]
InverseCorrection = Literal["none", "post_ema", "pre_ema", "jackknife"]
CORRECTIONS: dict[CrossFit, tuple[InverseCorrection, ...]] = {
    "none": ("none", "post_ema", "pre_ema"),
    "split": ("none", "post_ema", "pre_ema"),
    "symmetric": ("none", "post_ema", "pre_ema"),
    "leave_one_out": ("none", "jackknife"),
}


class Moments(NamedTuple):
    """Adam's two running averages before bias correction, of one shape."""

    m: Tensor
    v: Tensor


class EmaWeights(NamedTuple):
    """What bias-corrected moments consist of at a step: m̂ = m_old·m + m_new·g, v̂ = v_old·v + v_new·s."""

    m_old: float
    m_new: float
    v_old: float
    v_new: float

    @classmethod
    def at(cls, betas: tuple[float, float], step: float = math.inf) -> EmaWeights:
        """The weights at ``step`` (1-based); infinity is the limit without bias correction."""
        (b1, b2), (c1, c2) = betas, (1.0 - betas[0] ** step, 1.0 - betas[1] ** step)
        return cls(b1 / c1, (1.0 - b1) / c1, b2 / c2, (1.0 - b2) / c2)


class Group(NamedTuple):
    """Some of a step's microbatches.

    Attributes:
        mean: ḡ, their mean gradient.
        gradients: how g_j is spread over them; ``leave_one_out`` needs it.
        squares: how g_j² is; preconditioners made from mean squares and corrected inverses need it.
    """

    mean: Tensor
    gradients: Spread | None = None
    squares: Spread | None = None

    @classmethod
    def of(cls, gradients: Tensor, weights: Tensor | None = None) -> Group:
        """Everything about given microbatch gradients, shape (n, ...), of equal or of given ``weights``, shape (n,)."""
        shares = None if weights is None else weights.view(-1, *[1] * (gradients.dim() - 1)) / weights.sum()
        n = len(gradients) if weights is None else int((weights > 0.0).sum())
        mean = gradients.mean(dim=0) if shares is None else (shares * gradients).sum(dim=0)
        return cls(mean, Spread(gradients, n, shares=shares), Spread(gradients * gradients, n, shares=shares))


class Folds(NamedTuple):
    """An update as a mean of products; each array has shape (folds, ...).

    Attributes:
        numerator: m̂ of each fold.
        inverse: what it is multiplied by, 1/(√v̂ + ε) less its correction.
        second_moment: v̂ of each fold.
        spread: whose nodes the folds are; None for folds of equal weight.
        variance: what was subtracted from each inverse, in terms of the preconditioner's variance; None for nothing.
    """

    numerator: Tensor
    inverse: Tensor
    second_moment: Tensor
    spread: Spread | None = None
    variance: Tensor | None = None

    @property
    def update(self) -> Tensor:
        """u, the mean over folds of numerator × inverse."""
        products = self.numerator * self.inverse
        return products.mean(dim=0) if self.spread is None else self.spread.average(products)


@dataclass(frozen=True)
class Constants:
    """The places where the authors' code departs from what the method's derivation gives.

    Args:
        pre_ema: factor of the second term of half the second derivative of 1/(√v̂ + ε).
        around_fed_moment: measure the spread of g² around the second moment fed to v, not around its own mean.
        floor: least v̂ in the pre-EMA correction; one that is not 0 makes it depend on the gradients' scale.
        jackknife: multiple of the jackknife variance of the leave-one-out preconditioners, which is (n - 1)²/n times
            their sample variance; None for the sample variance itself.
    """

    pre_ema: float = 1.0 / 8.0
    around_fed_moment: bool = False
    floor: float = 0.0
    jackknife: float | None = 1.0


DERIVED = Constants()
REFERENCE = Constants(pre_ema=3.0 / 8.0, around_fed_moment=True, floor=1e-12, jackknife=None)


@dataclass(frozen=True)
class AdamForm:
    """A way to form Adam's update from the gradients g_1..g_n of n microbatches at the same parameters.

    ============== ==================================== ==============================================
    cross_fit      numerator                            second moment s
    ============== ==================================== ==============================================
    none           ḡ                                    ḡ²
    split          ḡ_A, one half                        mean of g_j² over B, the other half
    symmetric      both halves, each divided by what the other one gives; m and v move on as for none
    leave_one_out  g_r, mean over r                     ḡ_{-r}², r's microbatch left out; m, v as for none
    ============== ==================================== ==============================================

    With D = √v̂ + ε the inverse is 1/D less a second-order term, clamped at 0:

    * ``post_ema``: V/D³, V the variance of the mean of √(v̂ with g_j² for s) over microbatches
    * ``pre_ema``: κ²V_s(1/(4v̂D³) + 1/(8v̂^{3/2}D²)), V_s the variance of the mean of g_j², κ the weight of s in v̂
    * ``jackknife`` (leave_one_out only): V/D_r³, V = (n - 1)/n Σ(D_r - D̄)²; where that turns the update's sign, 0

    Args:
        cross_fit: how numerator and second moment are kept apart.
        inverse_correction: what is subtracted from the inverse.
        alpha: in [0, 1], for split: s = (1 - α) ḡ_A² + α · (mean square over B).
        adaptive_alpha: multiply α by the cosine between the two, floored at 0, per tensor.
        constants: of the corrections, :data:`DERIVED` or, for the numbers of the authors' code, :data:`REFERENCE`.

    Raises:
        ValueError: for an unknown name or a correction that ``cross_fit`` does not have.
    """

    cross_fit: CrossFit = "none"
    inverse_correction: InverseCorrection = "none"
    alpha: float = 1.0
    adaptive_alpha: bool = False
    constants: Constants = DERIVED

    def __post_init__(self) -> None:
        check_choice(self, "cross_fit", tuple(CORRECTIONS))
        check_choice(self, "inverse_correction", CORRECTIONS[self.cross_fit])
        check_number(self, "alpha", minimum=0.0, maximum=1.0)
        if self.cross_fit != "split" and (self.alpha != 1.0 or self.adaptive_alpha):
            raise ValueError(
                f"alpha={self.alpha}, adaptive_alpha={self.adaptive_alpha} with cross_fit={self.cross_fit!r}; mixing "
                "the second moments of two halves needs cross_fit='split'."
            )


def adam_folds(
    form: AdamForm, groups: Sequence[Group], moments: Moments, weights: EmaWeights, eps: float = 0.0
) -> Folds:
    """The parts of the update u.

    Args:
        form: which update.
        groups: (A, B) for split and symmetric, (all,) otherwise.
        moments: m and v before this step.
        weights: of old and new in m̂ and v̂, :meth:`EmaWeights.at`.
        eps: ε ≥ 0, outside the root.
    """
    if form.cross_fit == "leave_one_out":
        return _leave_one_out(form, groups[0], moments, weights, eps)
    if form.cross_fit == "symmetric":
        a, b = groups
        x, y = (_side(form, top, below, moments, weights, eps) for top, below in ((a, b), (b, a)))
        variance = None if x.variance is None or y.variance is None else pair(x.variance[0], y.variance[0])
        numerator, inverse, second = (pair(p[0], q[0]) for p, q in zip(x[:3], y[:3], strict=True))
        return Folds(numerator, inverse, second, None, variance)
    return _side(form, groups[0], groups[-1], moments, weights, eps)


def fed_moments(form: AdamForm, groups: Sequence[Group]) -> Moments:
    """What m and v absorb: (ḡ_A, s) for split, (ḡ, ḡ²) of all microbatches otherwise."""
    if form.cross_fit == "split":
        return Moments(groups[0].mean, _second_moment(form, *groups))
    g = groups[0].mean
    if len(groups) == 2:
        # The halves are weighted alike, as their two folds are.
        g = (g + groups[1].mean) / 2
    return Moments(g, g * g)


def support_clip(update: Tensor, fed: Moments, threshold: float, eps: float = 1e-12) -> Tensor:
    """u · min(1, √(τ (s + ε)/(g² + ε))): shorten it where the second moment hardly saw the numerator's gradient."""
    return update * (threshold * (fed.v + eps) / (fed.m * fed.m + eps)).sqrt_().clamp_(max=1.0)


def _second_moment(form: AdamForm, top: Group, below: Group) -> Tensor:
    if form.cross_fit == "none":
        return top.mean * top.mean
    assert below.squares is not None
    s = below.squares.average(below.squares.nodes)
    if form.cross_fit == "symmetric" or (form.alpha == 1.0 and not form.adaptive_alpha):
        return s
    own, alpha = top.mean * top.mean, form.alpha
    if form.adaptive_alpha:
        norms = (vector_norm(own) + 1e-12) * (vector_norm(s) + 1e-12)
        alpha = alpha * ((own * s).sum() / norms).clamp(0.0, 1.0)
    return lerp(own, s, alpha)


def _side(form: AdamForm, top: Group, below: Group, moments: Moments, weights: EmaWeights, eps: float) -> Folds:
    s = _second_moment(form, top, below)
    second = weights.v_old * moments.v + weights.v_new * s
    root = second.sqrt()
    d = root + eps
    inverse, variance = d.reciprocal(), None
    if form.inverse_correction != "none" and below.squares is not None and below.squares.count >= 2:
        squares = below.squares
        if form.inverse_correction == "post_ema":
            samples = (weights.v_old * moments.v + weights.v_new * squares.nodes).clamp_(min=0.0).sqrt_()
            variance = squares.variance_of_mean(samples)
            inverse = inverse - variance / (d * d * d)
        else:
            variance = squares.variance_of_mean(squares.nodes)
            if form.constants.around_fed_moment:
                variance = variance + (squares.average(squares.nodes) - s).square_() / (squares.count - 1)
            floored = second.clamp(min=max(form.constants.floor, torch.finfo(second.dtype).tiny))
            # In terms of ratios, of which none under- or overflows where gradients are small or large.
            relative = weights.v_new**2 * variance / floored / floored
            share = floored.sqrt() * inverse
            inverse = inverse * (1.0 - relative * share * (share / 4.0 + form.constants.pre_ema))
            variance = relative * floored / 4.0
        inverse = inverse.clamp_(min=0.0)
    numerator = weights.m_old * moments.m + weights.m_new * top.mean
    return Folds(numerator[None], inverse[None], second[None], None, None if variance is None else variance[None])


def _leave_one_out(form: AdamForm, group: Group, moments: Moments, weights: EmaWeights, eps: float) -> Folds:
    spread = group.gradients
    assert spread is not None
    others = spread.others(group.mean)
    second = weights.v_old * moments.v + weights.v_new * others * others
    d = second.sqrt() + eps
    numerator = weights.m_old * moments.m + weights.m_new * spread.nodes
    inverse, variance = d.reciprocal(), None
    if form.inverse_correction == "jackknife":
        factor = form.constants.jackknife
        variance = spread.variance_of_mean(d) * spread.count if factor is None else spread.jackknife(d) * factor
        corrected = inverse - variance * inverse * inverse * inverse
        same_sign = spread.average(numerator * corrected) * spread.average(numerator * inverse) >= 0.0
        inverse = torch.where(same_sign, corrected, 0.0)
        variance = variance[None]
    return Folds(numerator, inverse, second, spread, variance)
