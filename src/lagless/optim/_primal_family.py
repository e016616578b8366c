"""Named members of the family of primal averaging, with the settings of their papers."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer

from lagless.optim._primal import Interpolation, PrimalAveraging
from lagless.rules import EMA, WarmupAverage, checked


@checked
def schedule_free(
    optimizer: Optimizer,
    *,
    interpolation: Interpolation = 0.9,
    warmup_steps: int = 0,
    weight_decay_at_y: float = 0.0,
    compile: bool = False,
) -> PrimalAveraging:
    """Return Schedule-Free training around an optimizer without momentum.

    x is the mean of z_1, ..., z_t; iterates of a linear warm-up count by the square of their learning rate.

    Args:
        optimizer: SGD without momentum, or Adam with β₁ = 0: the interpolation takes the place of momentum. Its own
            decoupled weight decay is taken at z; leave it at 0 if ``weight_decay_at_y`` is given.
        interpolation: m, β₁ of the paper, in [0, 1].
        warmup_steps: W ≥ 0, steps over which a scheduler of yours raises the learning rate linearly.
        weight_decay_at_y: λ ≥ 0, decoupled weight decay taken at y, as in the authors' package.
        compile: as for :class:`PrimalAveraging`.

    Warns:
        UserWarning: if the optimizer has momentum; this is another method then.

    Reference:
        Defazio et al. (2024), *The Road Less Scheduled*, arXiv 2405.15682, Eq. 3-5, Algorithm 1; package schedulefree.
    """
    for group in optimizer.param_groups:
        momentum = group.get("momentum") or group.get("beta1") or (group.get("betas") or (0.0,))[0]
        if momentum:
            warnings.warn(
                f"schedule_free around {type(optimizer).__name__} with momentum {momentum}: it equals Schedule-Free "
                "without momentum only, where the interpolation takes its place. Give momentum=0 or betas=(0, β₂), or "
                "use gpa(), which keeps momentum.",
                stacklevel=2,
            )
            break
    return PrimalAveraging(
        optimizer,
        WarmupAverage(warmup_steps=warmup_steps),
        interpolation=interpolation,
        weight_decay_at_y=weight_decay_at_y,
        compile=compile,
    )


@checked
def gpa(optimizer: Optimizer, *, decay: float, interpolation: float = 0.9, compile: bool = False) -> PrimalAveraging:
    """Return generalized primal averaging: x is an EMA of z with a decay of its own.

    Args:
        optimizer: any; AdamW in the paper.
        decay: μ_x in [0, 1), for x ← μ_x x + (1 - μ_x) z. The paper matches Lookahead-like averaging over H steps by
            μ_x = μ^(1/H).
        interpolation: μ_y in [0, 1], the share of x in y.
        compile: as for :class:`PrimalAveraging`.

    Reference:
        Defazio et al. (2025), *Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs*, arXiv 2512.17131.
    """
    return PrimalAveraging(optimizer, EMA(decay=decay), interpolation=interpolation, compile=compile)


@checked
def lookahead(optimizer: Optimizer, *, steps: int = 5, alpha: float = 0.5) -> PrimalAveraging:
    """Return Lookahead: every k steps slow weights move towards the fast ones, which start again from them.

        every k steps:  x ← x + α (z - x),  z ← x

    The state of the optimizer goes on through a synchronisation, as in the paper's default.

    Args:
        optimizer: any.
        steps: k ≥ 1.
        alpha: α in (0, 1].

    Reference:
        Zhang et al. (2019), *Lookahead Optimizer: k steps forward, 1 step back*, arXiv 1907.08610, Algorithm 1.
    """
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha={alpha!r}; it must be a number in (0, 1].")
    return PrimalAveraging(optimizer, EMA(decay=1.0 - alpha, update_freq=steps), interpolation=0.0, pull=1.0)
