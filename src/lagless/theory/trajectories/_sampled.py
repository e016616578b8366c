"""Risks estimated on sampled paths, with standard errors, beside the exact ones."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike

from lagless.execution import Noise, apply_row, combine, update_rows
from lagless.rules import FloatArray, Rule, read_after
from lagless.theory.trajectories._estimators import Estimator
from lagless.theory.trajectories._gauss_markov import Steps
from lagless.theory.trajectories._process import OrnsteinUhlenbeck
from lagless.theory.trajectories._run import Move, iterate_steps, moves, read_steps


@dataclass(frozen=True)
class SampledRisk:
    """A Monte-Carlo estimate of E||μ̂ - μ*||²; numbers, or arrays over the times at which an average is read.

    Attributes:
        total: mean squared distance over the paths.
        standard_error: of that mean.
        paths: n.
    """

    total: float | FloatArray
    standard_error: float | FloatArray
    paths: int

    def z(self, exact: float | FloatArray) -> FloatArray:
        """(sampled - exact)/standard error, shape of ``exact``: about N(0, 1) where both are right."""
        return np.asarray((self.total - exact) / self.standard_error)


class Source(Protocol):
    """A trajectory that can be sampled step by step: the process, SGD or AdamW."""

    mu: FloatArray

    def step_time(self, dt: float | None) -> float:
        """Time per optimizer step."""
        ...

    def stream(
        self,
        paths: int,
        times: ArrayLike,
        *,
        seed: int,
        device: str | torch.device,
        dtype: torch.dtype,
        progress: bool,
    ) -> Iterator[torch.Tensor]:
        """θ at each of ``times``, shape (paths, d)."""
        ...


def sampled_risks(
    source: Source,
    rules: Mapping[str, Rule],
    *,
    steps: Steps,
    dt: float | None = None,
    at: Sequence[int] | None = None,
    paths: int = 1000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
    progress: bool = False,
) -> dict[str, SampledRisk]:
    """Run rules on sampled paths, all on the same ones; memory is that of the buffers, not of the paths.

    Args:
        source: an :class:`OrnsteinUhlenbeck`, :class:`QuadraticSGD` or :class:`QuadraticAdamW`.
        rules: name → rule.
        steps: optimizer steps at which there are iterates, ``steps[0]`` that of θ_0; a number N stands for 0..N.
        dt: for the process, time per optimizer step; default η.
        at: steps at which the averages are read; default the last.
        paths: how many trajectories, ≥ 2.
        seed: of the generator.
        device: where the paths live.
        dtype: of the paths and buffers.
        progress: show a progress bar.

    Returns:
        name → :class:`SampledRisk`: numbers if ``at`` is None, else arrays of shape (len(at),).

    Raises:
        ValueError: if steps are not increasing, a rule is read before its first update, or ``paths`` < 2.
    """
    if not paths >= 2:
        raise ValueError(f"paths={paths}; a standard error needs at least 2.")
    iterates = iterate_steps(steps)
    where = read_steps(iterates, at)
    runs: dict[Hashable, _Run] = {}
    for name, rule in rules.items():
        run = runs.setdefault((rule.schedule, rule.buffer_keys), _Run(rule, moves(rule, iterates, where)))
        run.members[name] = rule
    times = source.step_time(dt) * (np.array(iterates) - iterates[0])
    mu = torch.as_tensor(source.mu, dtype=dtype, device=device)

    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in rules}
    live = source.stream(paths, times, seed=seed, device=device, dtype=dtype, progress=progress)
    for index, theta in enumerate(live):
        for run in runs.values():
            for name, average in run.step(index, theta):
                squared = (average - mu).square_().sum(dim=1, dtype=torch.float64)
                spread, mean = torch.std_mean(squared)
                found[name][iterates[index]] = float(mean), float(spread) / paths**0.5
    return {name: _collect([values[step] for step in where], paths, at is None) for name, values in found.items()}


def averages_along(rules: Mapping[str, Rule], path: torch.Tensor, steps: Steps) -> dict[str, torch.Tensor]:
    """What rules return at every iterate of given trajectories.

    Args:
        rules: name → rule; each must have an average at every step, as those with ``update_freq=1`` have.
        path: shape (..., n, d), θ at each of ``steps``.
        steps: as in :func:`sampled_risks`, n of them.

    Returns:
        name → shape (..., n, d).

    Raises:
        ValueError: if ``path`` does not have n iterates, or a rule is read before its first update.
    """
    iterates = iterate_steps(steps)
    if path.shape[-2] != len(iterates):
        raise ValueError(f"path has {path.shape[-2]} iterates; steps has {len(iterates)}.")
    found: dict[str, torch.Tensor] = {}
    for name, rule in rules.items():
        run = _Run(rule, moves(rule, iterates, iterates))
        run.members[name] = rule
        values = [average for k in range(len(iterates)) for _, average in run.step(k, path[..., k, :])]
        found[name] = torch.stack(values, dim=-2)
    return found


def sampled_estimates(
    process: OrnsteinUhlenbeck,
    estimators: Mapping[str, Estimator],
    times: ArrayLike,
    *,
    paths: int = 1000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> dict[str, SampledRisk]:
    """The squared error of estimators on sampled paths, all on the same ones.

    Args:
        process: the process.
        estimators: name → estimator.
        times: shape (n,), from 0 to T; fine, for integrals over time are trapezoidal sums over them.
        paths: how many trajectories, ≥ 2; all n·paths·d numbers are held at once.
        seed: of the generator.
        device: where the paths live.
        progress: show a progress bar.

    Raises:
        ValueError: if ``paths`` < 2, or ``times`` does not start at 0, is not increasing or has only one.
    """
    moments = np.asarray(times, dtype=np.float64)
    if moments.ndim != 1 or moments.size < 2 or moments[0] != 0.0:
        raise ValueError(f"times={times!r}; estimators need two or more, the first of them 0.")
    if not paths >= 2:
        raise ValueError(f"paths={paths}; a standard error needs at least 2.")
    path = process.sample(paths, times, seed=seed, device=device, progress=progress)
    mu = torch.as_tensor(process.mu, dtype=torch.float64).to(path)
    found: dict[str, SampledRisk] = {}
    for name, estimator in estimators.items():
        spread, mean = torch.std_mean((estimator.estimate(process, times, path) - mu).square().sum(dim=-1))
        found[name] = _collect([(float(mean), float(spread) / paths**0.5)], paths, True)
    return found


class _Run:
    """The buffers of rules with equal schedule and labels, on many paths."""

    def __init__(self, head: Rule, plan: Iterator[Move]) -> None:
        self.head, self.plan = head, plan
        self.members: dict[str, Rule] = {}
        self.buffers: list[torch.Tensor] = []
        self.next: Move | None = next(plan, None)

    def step(self, index: int, theta: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Take iterate ``index``; yields the averages to be read there."""
        if index == 0:
            self.buffers = [theta.clone() for _ in self.head.buffer_keys]
        move = self.next
        if move is None or move.position != index:
            return
        self.next = next(self.plan, None)
        event, columns = move.event, [[buffer] for buffer in self.buffers]
        if event.follows:
            for buffer in self.buffers:
                buffer.copy_(theta)
        if event.updates:
            for row in update_rows(self.head.update(event.last)):
                apply_row(columns, row, [theta], Noise(0, event.step))
        if move.read:
            for name, rule in self.members.items():
                read = None if move.live else read_after(rule, event.last, event.step)
                terms = [] if read is None else zip(self.buffers, read.buffers, strict=True)
                yield name, theta if read is None else combine([(theta, read.live), *terms])


def _collect(values: Sequence[tuple[float, float]], paths: int, scalar: bool) -> SampledRisk:
    if scalar:
        return SampledRisk(*values[0], paths)
    total, error = np.array(values).T
    return SampledRisk(total, error, paths)
