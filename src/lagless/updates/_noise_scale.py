"""The gradient noise scale, from means of squares over microbatches."""

from __future__ import annotations

from typing import Any, NamedTuple


class NoiseMoments(NamedTuple):
    """What a step's gradient is made of.

    Attributes:
        signal: |G|², the squared norm of the expected gradient.
        noise: tr Σ, the trace of the covariance of the gradient of one unit of weight.
    """

    signal: Any
    noise: Any


def noise_moments(mean_square: Any, square_of_mean: Any, spread: Any, weight: Any) -> NoiseMoments:
    """Return unbiased estimates of |G|² and tr Σ, numbers or tensors.

    A microbatch of weight w has the gradient g with E g = G and Cov g = Σ/w; ḡ is the mean of all, weighed by w, and a
    a statistic of some of them:

        E |ḡ|² = |G|² + tr Σ/W,  E a = |G|² + s·tr Σ:   tr Σ = (a - |ḡ|²)/(s - 1/W),  |G|² = |ḡ|² - tr Σ/W

    With n microbatches, a = Σ w|g|²/W has s = n/W, which gives |G|² = (n|ḡ|² - a)/(n - 1). Of the microbatches in one
    half, n_h of weight W_h, the same mean has s = n_h/W_h, and the square of their mean gradient s = 1/W_h.

    Args:
        mean_square: a.
        square_of_mean: |ḡ|².
        spread: s > 1/W.
        weight: W > 0, of all microbatches together; n where all weigh 1.

    Reference:
        McCandlish et al. (2018), *An Empirical Model of Large-Batch Training*, arXiv 1812.06162, Appendix A.1.

    >>> gradients = [3.0, 1.0, 2.0, 2.0]
    >>> noise_moments(sum(g * g for g in gradients) / 4, (sum(gradients) / 4) ** 2, 1.0, 4.0).noise  # sample variance
    0.6666666666666666
    """
    noise = (mean_square - square_of_mean) / (spread - 1.0 / weight)
    return NoiseMoments(square_of_mean - noise / weight, noise)
