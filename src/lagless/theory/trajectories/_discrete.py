"""SGD and AdamW on the noisy quadratic ½(θ - μ*)ᵀA(θ - μ*), step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from lagless._validation import require_integer
from lagless.rules import FloatArray, Rule
from lagless.theory.numerics import check_positive, point_and_matrices
from lagless.theory.trajectories._gauss_markov import BLOCK, GaussMarkov, Steps, track
from lagless.theory.trajectories._risk import Risk
from lagless.theory.trajectories._run import iterate_steps


class QuadraticSGD(GaussMarkov):
    """SGD on a quadratic with Gaussian gradient noise; its moments are exact too.

        θ ← θ - lr (A (θ - μ*) + Σ ξ),        ξ ~ N(0, I)

    With lr = η, step k approximates the Ornstein-Uhlenbeck process at time kη. Times are optimizer steps.

    Args:
        A: the Hessian, shape (d, d), symmetric positive definite; a number a stands for aI.
        mu: μ*, the minimum, shape (d,).
        theta0: θ_0, the start, shape (d,).
        lr: learning rate > 0; above 2/λ_max(A) SGD diverges, which is allowed.
        Sigma: Σ, shape (d, d), symmetric positive definite; a number σ stands for σI.

    Raises:
        ValueError: if a shape disagrees, a number is out of range, or A or Σ is not symmetric positive definite.

    >>> sgd = QuadraticSGD(A=0.5, mu=0.0, theta0=1.0, lr=1.0, Sigma=1.0)
    >>> sgd.mean(2).tolist(), sgd.cov(2, 2).tolist()
    ([0.25], [[1.25]])
    """

    def __init__(self, A: ArrayLike, mu: ArrayLike, theta0: ArrayLike, lr: float, Sigma: ArrayLike) -> None:
        super().__init__(A, mu, theta0, Sigma)
        self.lr = check_positive("lr", lr)

    def decay(self, duration: float) -> FloatArray:
        """(1 - lr a_i)^k, shape (d,)."""
        return (1.0 - self.lr * self.rates) ** _whole(duration)

    def innovation(self, duration: float) -> FloatArray:
        """lr² Σ²_ij Σ_{l<k} (ρ_i ρ_j)^l with ρ_i = 1 - lr a_i, shape (d, d), in ``basis``."""
        scaled = self.lr * self.rates
        # 1 - ρ_i ρ_j without cancellation.
        gap = scaled[:, None] + scaled - np.outer(scaled, scaled)
        return self.lr**2 * self.noise * _geometric_sum(gap, _whole(duration))

    def step_time(self, dt: float | None) -> float:
        """1: time is counted in optimizer steps."""
        if dt is not None:
            raise ValueError("dt: SGD counts time in optimizer steps; leave dt out.")
        return 1.0

    def risk(self, rule: Rule, *, steps: Steps, at: Sequence[int] | None = None) -> Risk:
        """The exact E||μ̂ - μ*||² of an averaging rule; arguments as in :meth:`risks`."""
        return self.risks({"": rule}, steps=steps, at=at)[""]


class QuadraticAdamW:
    """AdamW on a quadratic with Gaussian gradient noise, simulated on many paths at once.

        g = A (θ - μ*) + Σ ξ        m ← β_1 m + (1-β_1) g        v ← β_2 v + (1-β_2) g²
        θ ← (1 - lr·wd) θ - lr (m/(1-β_1^k)) / (√(v/(1-β_2^k)) + ε)

    Coordinates are those of A as given: AdamW is not rotation invariant. Its trajectory is not Gaussian, so there is no
    exact risk beside it.

    Args:
        A: the Hessian, shape (d, d), symmetric positive definite; a number a stands for aI.
        mu: μ*, the minimum, shape (d,).
        theta0: θ_0, the start, shape (d,).
        lr: learning rate > 0.
        Sigma: Σ, shape (d, d), symmetric positive definite; a number σ stands for σI.
        betas: (β_1, β_2), each in [0, 1).
        eps: ε > 0.
        weight_decay: wd ≥ 0, decoupled.

    Raises:
        ValueError: if a shape disagrees, a number is out of range, or A or Σ is not symmetric positive definite.

    Reference:
        Loshchilov and Hutter (2019), arXiv 1711.05101, Algorithm 2.
    """

    def __init__(
        self,
        A: ArrayLike,
        mu: ArrayLike,
        theta0: ArrayLike,
        lr: float,
        Sigma: ArrayLike,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        (self.mu, self.theta0), (self.A, self.Sigma) = point_and_matrices(
            {"mu": mu, "theta0": theta0}, {"A": A, "Sigma": Sigma}
        )
        self.lr, self.eps = check_positive("lr", lr), check_positive("eps", eps)
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={betas!r}; it must be two numbers in [0, 1).")
        if not 0.0 <= weight_decay < np.inf:
            raise ValueError(f"weight_decay={weight_decay!r}; it must be a finite number >= 0.")
        self.betas, self.weight_decay = betas, weight_decay

    def step_time(self, dt: float | None) -> float:
        """1: time is counted in optimizer steps."""
        if dt is not None:
            raise ValueError("dt: AdamW counts time in optimizer steps; leave dt out.")
        return 1.0

    def stream(
        self,
        paths: int,
        times: ArrayLike,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
        progress: bool = False,
    ) -> Iterator[torch.Tensor]:
        """Independent trajectories, shape (paths, d), at each of the optimizer steps ``times``; arguments as in
        :meth:`GaussMarkov.stream`.
        """
        require_integer("paths", paths, minimum=1)
        wanted = iterate_steps([_whole(time) for time in np.asarray(times).tolist()])
        generator = torch.Generator(device).manual_seed(seed)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        hessian, spread = torch.tensor(self.A, **like), torch.tensor(self.Sigma, **like)
        mu = torch.tensor(self.mu, **like)
        theta = torch.tensor(self.theta0, **like).repeat(paths, 1)
        first, second = torch.zeros_like(theta), torch.zeros_like(theta)
        beta1, beta2 = self.betas
        due, last = set(wanted), wanted[-1]
        if 0 in due:
            yield theta.clone()
        size = max(1, BLOCK // (paths * len(self.mu)))
        for first_step in track(range(1, last + 1, size), progress, "AdamW"):
            block = range(first_step, min(first_step + size, last + 1))
            noise = torch.randn(len(block), *theta.shape, generator=generator, **like) @ spread
            for k, kick in zip(block, noise, strict=True):
                gradient = kick.addmm_(theta - mu, hessian)
                first.lerp_(gradient, 1.0 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
                scale = (second / (1.0 - beta2**k)).sqrt_().add_(self.eps)
                theta = theta * (1.0 - self.lr * self.weight_decay)
                theta.addcdiv_(first, scale, value=-self.lr / (1.0 - beta1**k))
                if k in due:
                    yield theta.clone()

    def sample(
        self,
        paths: int,
        times: ArrayLike,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
        progress: bool = False,
    ) -> torch.Tensor:
        """All of :meth:`stream` at once: shape (paths, n, d)."""
        parts = self.stream(paths, times, seed=seed, device=device, dtype=dtype, progress=progress)
        return torch.stack(list(parts), dim=1)


def _whole(duration: float) -> int:
    steps = round(duration)
    if steps != duration or steps < 0:
        raise ValueError(f"t={duration!r}; time is counted in optimizer steps, a whole number >= 0.")
    return steps


def _geometric_sum(gap: FloatArray, count: int) -> FloatArray:
    """Σ_{l<count} (1 - gap)^l for gap ≥ 0, accurate where ``gap`` is small."""
    ratio = 1.0 - gap
    # 1 - ratio^count keeps its digits through expm1 where the ratio is near 1, directly where it is not.
    exponent = count * np.log1p(np.where(ratio > 0.0, -gap, 0.0))
    numerator = np.where(ratio > 0.0, -np.expm1(exponent), 1.0 - ratio**count)
    return np.where(gap == 0.0, float(count), numerator / np.where(gap == 0.0, 1.0, gap))
