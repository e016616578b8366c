"""AdamW with a pull towards an average of the weights: the update of PACE."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lagless.updates._lerp import lerp, lerp_square


class PaceConstants(NamedTuple):
    """The numbers of one step; floats, or tensors that broadcast against the weights.

    Attributes:
        sign: of the gradient; -1 to maximize.
        decay: 1 - ηλ.
        first: 1 - β₁.
        second: 1 - β₂.
        correction: (1 - β₂^t)^½.
        rate: η/(1 - β₁^t).
        eps: ε.
        pull: η c d_t, the numerator of the gain.
        ceiling: the largest gain; 1, or infinity for no clamp.
        average: the weight that θ_t gets in the average.
    """

    sign: Any
    decay: Any
    first: Any
    second: Any
    correction: Any
    rate: Any
    eps: Any
    pull: Any
    ceiling: Any
    average: Any


def pace_constants(
    step: Any,
    *,
    lr: Any,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    pullback: Any,
    clamp: bool,
    maximize: bool,
    average: Any,
) -> PaceConstants:
    """The numbers of step ``step``.

    Args:
        step: t ≥ 1; with a tensor of steps, what depends on them has its shape.
        lr: η, of this step.
        betas: (β₁, β₂).
        eps: ε.
        weight_decay: λ.
        pullback: c d_t.
        clamp: whether gains end at 1.
        maximize: whether the gradient is of something to maximize.
        average: the weight of θ_t in the average.
    """
    beta1, beta2 = betas
    return PaceConstants(
        sign=-1.0 if maximize else 1.0,
        decay=1.0 - lr * weight_decay,
        first=1.0 - beta1,
        second=1.0 - beta2,
        correction=(1.0 - beta2**step) ** 0.5,
        rate=lr / (1.0 - beta1**step),
        eps=eps,
        pull=lr * pullback,
        ceiling=1.0 if clamp else float("inf"),
        average=average,
    )


def pulled_adamw(
    theta: Tensor, grad: Tensor, m: Tensor, v: Tensor, target: Tensor, k: PaceConstants
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW, pulled towards ``target``, coordinate by coordinate.

        m_t = β₁m + (1 - β₁)g        v_t = β₂v + (1 - β₂)g²        D = (v_t/(1 - β₂^t))^½ + ε
        θ_t = (1 - ηλ)θ - η m_t/((1 - β₁^t) D) + min(η c d_t/D, 1)(target - θ)

    The pull starts at the weights before the step. At gain 1 it puts the AdamW step on top of the target: it does not
    undo the step.

    Args:
        theta: θ, the weights.
        grad: g.
        m: first moment.
        v: second moment, uncorrected.
        target: what the weights are pulled to; for PACE the average before this step.
        k: the numbers of this step.

    Returns:
        θ_t, m_t, v_t; nothing is modified.

    Reference:
        Au and Block, *Training for the Model You Return*, arXiv 2606.25086, Algorithm 1, in the form of the authors'
        code: the pull is applied at every step, and v is bias-corrected.
    """
    grad = k.sign * grad
    m, v = lerp(m, grad, k.first), lerp_square(v, grad, k.second)
    inverse = k.correction / (v.sqrt() + k.correction * k.eps)  # 1/D by a single division of tensors
    gain = (k.pull * inverse).clamp(max=k.ceiling)
    return k.decay * theta - k.rate * (m * inverse) + gain * (target - theta), m, v
