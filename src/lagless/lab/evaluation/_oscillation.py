"""How much the closed-loop accuracy of a model swings from one checkpoint to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Oscillation:
    """Swings of an accuracy along training, without what only comes from drawing a finite number of samples.

    Attributes:
        mean_absolute: mean |a_{t+1} - a_t| as measured, sampling noise included.
        step: root mean square of a_{t+1} - a_t, noise subtracted. Progress counts, too.
        jitter: standard deviation of a_t about a locally straight curve, noise subtracted; NaN for two checkpoints.
        noise: standard deviation of one a_t from sampling alone, root mean square over checkpoints.
        checkpoints: how many.
    """

    mean_absolute: float
    step: float
    jitter: float
    noise: float
    checkpoints: int


def oscillation(accuracies: ArrayLike, samples: int) -> Oscillation:
    """The swings of a_t, the mean over prompts of the accuracy at checkpoint t.

    With p_ti the share of ``samples`` = n responses to prompt i of P that are right, prompts being fixed,

        a_t = mean_i p_ti        s_t² = P^-2 Σ_i p_ti (1 - p_ti)/(n - 1)

    s_t² is the unbiased estimate of the sampling variance of a_t. Swings are mean squares, from which it can be
    subtracted (a result below 0 is reported as 0):

        step²   = mean_t [(a_{t+1} - a_t)² - s_{t+1}² - s_t²]
        jitter² = mean_t [(a_{t+1} - 2a_t + a_{t-1})² - s_{t+1}² - 4s_t² - s_{t-1}²] / 6

    A steady rise counts in step and cancels in jitter; independent swings of variance σ² give step² = 2σ² and jitter² =
    σ².

    Args:
        accuracies: shape (T, P), neighbouring checkpoints × the same prompts, each in [0, 1].
        samples: n ≥ 2, responses per prompt.

    Raises:
        ValueError: if there are fewer than two checkpoints or samples, or an accuracy is not in [0, 1].

    >>> oscillation([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]], samples=10).step
    0.5
    """
    p = np.asarray(accuracies, dtype=np.float64)
    if p.ndim != 2 or p.shape[0] < 2 or p.shape[1] < 1:
        raise ValueError(
            f"accuracies: shape {p.shape}; it must be (checkpoints, prompts) with two checkpoints at least."
        )
    if not ((p >= 0.0) & (p <= 1.0)).all():
        raise ValueError("accuracies: each must lie in [0, 1].")
    if samples < 2:
        raise ValueError(f"samples={samples}; the noise of sampling shows only with 2 samples per prompt or more.")
    a = p.mean(axis=1)
    s2 = (p * (1.0 - p)).mean(axis=1) / p.shape[1] / (samples - 1)
    first, second = np.diff(a), np.diff(a, n=2)
    step = np.mean(first**2 - s2[1:] - s2[:-1])
    jitter = np.mean(second**2 - s2[2:] - 4.0 * s2[1:-1] - s2[:-2]) / 6.0 if len(a) > 2 else math.nan
    return Oscillation(
        mean_absolute=float(np.abs(first).mean()),
        step=math.sqrt(max(0.0, step)),
        jitter=math.sqrt(max(0.0, jitter)) if len(a) > 2 else math.nan,
        noise=math.sqrt(float(s2.mean())),
        checkpoints=len(a),
    )
