"""Gauss-Markov trajectories in a quadratic: what the Ornstein-Uhlenbeck process and SGD have in common.

In the eigenbasis of A every coordinate of θ - μ* is a scalar recursion, z ← ρ z + noise, with ρ known for any gap. The
noises of different coordinates are correlated unless A and Σ commute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from lagless._validation import require_integer
from lagless.rules import FloatArray, Rule
from lagless.theory.numerics import check_time, point_and_matrices, square_root
from lagless.theory.trajectories._risk import Risk, risk_from_weights, risks_from_moments
from lagless.theory.trajectories._run import iterate_steps

Steps = int | Sequence[int]
BLOCK = 2**20
T = TypeVar("T")


class GaussMarkov(ABC):
    """A Gaussian trajectory that starts at a fixed θ_0 and is pulled towards μ* by a symmetric positive definite A.

    Args:
        A: the Hessian, shape (d, d), symmetric positive definite; a number a stands for aI.
        mu: μ*, the minimum, shape (d,).
        theta0: θ_0, the start, shape (d,).
        Sigma: Σ, shape (d, d), symmetric positive definite; a number σ stands for σI.

    Attributes:
        dimension: d.
        rates: shape (d,), the eigenvalues a_i of A, ascending.
        basis: shape (d, d), the eigenvectors of A in columns.
        start: shape (d,), θ_0 - μ* in that basis.
        noise: shape (d, d), Σ² in that basis.

    Raises:
        ValueError: if a shape disagrees, a number is not finite, or A or Σ is not symmetric positive definite.
    """

    def __init__(self, A: ArrayLike, mu: ArrayLike, theta0: ArrayLike, Sigma: ArrayLike) -> None:
        (self.mu, self.theta0), (self.A, self.Sigma) = point_and_matrices(
            {"mu": mu, "theta0": theta0}, {"A": A, "Sigma": Sigma}
        )
        self.dimension = len(self.mu)
        self.rates, self.basis = np.linalg.eigh(self.A)
        self.start: FloatArray = self.basis.T @ (self.theta0 - self.mu)
        self.noise: FloatArray = self.basis.T @ self.Sigma @ self.Sigma @ self.basis

    @abstractmethod
    def decay(self, duration: float) -> FloatArray:
        """ρ, shape (d,): the factor by which θ - μ* shrinks in ``duration``, per coordinate of ``basis``."""

    @abstractmethod
    def innovation(self, duration: float) -> FloatArray:
        """The covariance, shape (d, d), of the noise that enters in ``duration``, in ``basis``."""

    @abstractmethod
    def step_time(self, dt: float | None) -> float:
        """The time that one optimizer step takes."""

    def mean(self, t: ArrayLike) -> FloatArray:
        """E θ_t, shape (..., d) for t of shape (...).

        Raises:
            ValueError: if a time is not finite and ≥ 0.
        """
        times = np.asarray(t, dtype=np.float64)
        for time in times.ravel():
            check_time("t", float(time))
        decays = np.array([self.decay(float(time)) for time in times.ravel()]).reshape(*times.shape, self.dimension)
        return self.mu + (decays * self.start) @ self.basis.T

    def cov(self, s: float, t: float) -> FloatArray:
        """Cov(θ_s, θ_t), shape (d, d): rows belong to s, columns to t.

        Raises:
            ValueError: if a time is not finite and ≥ 0.
        """
        s, t = check_time("s", s), check_time("t", t)
        shared = self.innovation(min(s, t))
        kernel = self.decay(s - t)[:, None] * shared if s >= t else shared * self.decay(t - s)
        return self.basis @ kernel @ self.basis.T

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
        """Independent trajectories, one time after another, drawn from the exact transition law.

        Args:
            paths: how many trajectories, ≥ 1.
            times: shape (n,), ≥ 0 and increasing; any spacing, there is no discretisation error. Time 0 is θ_0.
            seed: seeds a generator on ``device``; streams differ between kinds of device.
            device: where the tensors live.
            dtype: of the tensors.
            progress: show a progress bar.

        Yields:
            Shape (paths, d), θ at each of ``times``.

        Raises:
            ValueError: if ``times`` is negative or not increasing, or ``paths`` is not an integer ≥ 1.
        """
        require_integer("paths", paths, minimum=1)
        gaps = _gaps(times)
        generator = torch.Generator(device).manual_seed(seed)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        basis, mu = torch.tensor(self.basis, **like), torch.tensor(self.mu, **like)
        decays = {gap: torch.tensor(self.decay(gap), **like) for gap in set(gaps)}
        spreads = {gap: torch.tensor(square_root(self.innovation(gap)), **like) for gap in set(gaps)}
        state = torch.tensor(self.start, **like).repeat(paths, 1)
        # Many steps per matrix product: a product of one step's size costs less than starting the threads for it.
        size = max(1, BLOCK // (paths * self.dimension))
        for first in track(range(0, len(gaps), size), progress, "sampling"):
            block = gaps[first : first + size]
            noise = torch.randn(len(block), paths, self.dimension, generator=generator, **like)
            states = torch.matmul(noise, torch.stack([spreads[gap] for gap in block]))
            for step, gap in zip(states, block, strict=True):
                state = step.addcmul_(state, decays[gap])
            yield from torch.matmul(states, basis.T).add_(mu)

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

    def risks(
        self, rules: Mapping[str, Rule], *, steps: Steps, dt: float | None = None, at: Sequence[int] | None = None
    ) -> dict[str, Risk]:
        """The exact E||μ̂ - μ*||² of averaging rules, all of them in one pass: O(N r² d) per rule for a whole curve.

        Args:
            rules: name → rule.
            steps: optimizer steps at which there are iterates, ``steps[0]`` that of θ_0; a number N stands for 0..N.
            dt: time per optimizer step; see the process for its default.
            at: steps at which the averages are read; default the last. Reads follow
                :func:`~lagless.trajectory_weights`.

        Returns:
            name → :class:`Risk`: numbers if ``at`` is None, else arrays of shape (len(at),).

        Raises:
            ValueError: if steps are not increasing, or a rule is read before its first update.
        """
        return risks_from_moments(self, rules, iterate_steps(steps), self.step_time(dt), at)

    def risk_of_weights(self, weights: ArrayLike, *, steps: Steps, dt: float | None = None) -> Risk:
        """The exact E||Σ_k w_k θ_k - μ*||² of any weights over the iterates: O(N d) per row, no N×N matrix.

        Args:
            weights: shape (n,) or (G, n).
            steps: as in :meth:`risks`.
            dt: as in :meth:`risks`.

        Returns:
            Numbers for one row, arrays of shape (G,) for many.
        """
        return risk_from_weights(self, weights, iterate_steps(steps), self.step_time(dt))


def _gaps(times: ArrayLike) -> list[float]:
    """Durations from 0 to the first time and from each to the next; those that differ by the rounding of the times
    themselves are made equal.
    """
    values = np.asarray(times, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not (values[0] >= 0.0 and (np.diff(values) > 0.0).all()):
        raise ValueError(f"times must be a non-empty increasing sequence of numbers >= 0; got {times!r}.")
    gaps = [float(values[0])]
    for before, after in zip(values[:-1].tolist(), values[1:].tolist(), strict=True):
        gap = after - before
        same = abs(gap - gaps[-1]) <= 4.0 * np.finfo(float).eps * after
        gaps.append(gaps[-1] if same else gap)
    return gaps


def track(items: Sequence[T], show: bool, description: str) -> Iterable[T]:
    """Return ``items``, with a progress bar around them if ``show``."""
    if not show:
        return items
    from rich.progress import track as bar

    return bar(items, description=description)
