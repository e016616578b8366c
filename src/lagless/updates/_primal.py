"""AdamW with its gradient taken between the iterate and the average: the update of primal averaging around AdamW."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lagless.updates._lerp import lerp, lerp_square


class PrimalConstants(NamedTuple):
    """The numbers of one step; floats, or tensors that broadcast against the weights.

    Attributes:
        sign: of the gradient; -1 to maximize.
        decay: 1 - ηλ.
        first: 1 - β₁.
        second: 1 - β₂.
        correction: (1 - β₂^t)^½.
        rate: η/(1 - β₁^t).
        eps: ε.
        ahead: 1/m_t, by which x is recovered from y and z.
        decay_at_y: η λ_y.
        average: the weight that z_{t+1} gets in the average.
        pull: p at update steps of the average, 0 at others.
        interpolation: m_{t+1}.
    """

    sign: Any
    decay: Any
    first: Any
    second: Any
    correction: Any
    rate: Any
    eps: Any
    ahead: Any
    decay_at_y: Any
    average: Any
    pull: Any
    interpolation: Any


def primal_adamw(
    y: Tensor, grad: Tensor, m: Tensor, v: Tensor, z: Tensor, k: PrimalConstants
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, m, v and z after one step of AdamW at z with the gradient at y; nothing is modified.

        x_t = z_t + (y_t - z_t)/m_t
        z_{t+1} = AdamW step from z_t - η λ_y y_t with g(y_t)
        x_{t+1} = x_t + a (z_{t+1} - x_t)
        z_{t+1} ← z_{t+1} + p (x_{t+1} - z_{t+1})
        y_{t+1} = z_{t+1} + m_{t+1} (x_{t+1} - z_{t+1})

    Args:
        y: where the gradient was taken.
        grad: g.
        m: first moment.
        v: second moment, uncorrected.
        z: the iterate of AdamW.
        k: the numbers of this step.

    Reference:
        Defazio et al., *The Road Less Scheduled*, arXiv 2405.15682, Eq. 3-5, for any weights of the average.
    """
    grad = k.sign * grad
    x = lerp(z, y, k.ahead)
    m, v = lerp(m, grad, k.first), lerp_square(v, grad, k.second)
    inverse = k.correction / (v.sqrt() + k.correction * k.eps)
    z = k.decay * (z - k.decay_at_y * y) - k.rate * (m * inverse)
    distance = lerp(x, z, k.average) - z
    z, distance = z + k.pull * distance, (1.0 - k.pull) * distance
    return z + k.interpolation * distance, m, v, z
