"""Exact risk of averaging rules on a Gauss-Markov trajectory, by two executors.

Both work per eigen-coordinate, where the trajectory is z ← ρ z + ε: coefficients of a rule are scalars, so they commute
with the rotation into the eigenbasis, and E||μ̂ - μ*||² needs only the diagonal of the covariance there. The first
pushes means and covariances through the rule's own recursion, the second starts from its weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from lagless.rules import FloatArray, Rule, Tick, UpdateSchedule
from lagless.theory.trajectories._run import moves, read_steps


@dataclass(frozen=True)
class Risk:
    """E||μ̂ - μ*||² and its two parts; numbers, or arrays over the times at which an average is read.

    Attributes:
        bias_squared: ||E μ̂ - μ*||².
        variance: Tr Cov(μ̂).
    """

    bias_squared: float | FloatArray
    variance: float | FloatArray

    @property
    def total(self) -> float | FloatArray:
        """The expected squared distance from the minimum."""
        return self.bias_squared + self.variance


class Chain(Protocol):
    """What the executors need of a trajectory; see :class:`~lagless.theory.GaussMarkov`."""

    mu: FloatArray
    basis: FloatArray
    start: FloatArray

    def decay(self, duration: float) -> FloatArray:
        """ρ, shape (d,)."""
        ...

    def innovation(self, duration: float) -> FloatArray:
        """Noise covariance, shape (d, d)."""
        ...


class Transitions:
    """ρ and the diagonal of the noise covariance, by the number of optimizer steps between two iterates."""

    def __init__(self, chain: Chain, step_time: float) -> None:
        self._chain = chain
        self._step_time = step_time
        self._known: dict[int, tuple[FloatArray, FloatArray]] = {}

    def __call__(self, steps: int) -> tuple[FloatArray, FloatArray]:
        """Over ``steps`` optimizer steps."""
        if steps not in self._known:
            duration = steps * self._step_time
            self._known[steps] = self._chain.decay(duration), np.diag(self._chain.innovation(duration)).copy()
        return self._known[steps]


def risk_from_weights(chain: Chain, weights: ArrayLike, steps: Sequence[int], step_time: float) -> Risk:
    """The risk of Σ_k w_k θ_k: bias Σ w_k E θ_k - μ*, variance Σ_k q_k (Σ_{j≥k} w_j ρ_{k→j})².

    q_k is the variance of the noise that entered between iterates k-1 and k: one backward sum instead of wᵀKw.

    Args:
        chain: the trajectory.
        weights: shape (n,) or (G, n).
        steps: n, the optimizer step of each iterate.
        step_time: time per optimizer step.

    Returns:
        Numbers, or arrays of shape (G,).

    Raises:
        ValueError: if the last axes disagree.
    """
    given = np.asarray(weights, dtype=np.float64)
    rows = np.atleast_2d(given)
    if rows.shape[1] != len(steps):
        raise ValueError(f"weights have {rows.shape[1]} entries per row; there are {len(steps)} iterates.")
    transition = Transitions(chain, step_time)
    reach = np.zeros((len(rows), len(chain.start)))
    variance = np.zeros(len(rows))
    for k in range(len(steps) - 1, 0, -1):
        reach = reach + rows[:, k, None]
        decay, noise = transition(steps[k] - steps[k - 1])
        variance += reach**2 @ noise
        reach = reach * decay
    reach = reach + rows[:, 0, None]
    # Weights that do not sum to 1 also move the average along μ* itself.
    bias = reach * chain.start + (rows.sum(axis=1) - 1.0)[:, None] * (chain.basis.T @ chain.mu)
    squared = (bias**2).sum(axis=1)
    return Risk(squared, variance) if given.ndim == 2 else Risk(float(squared[0]), float(variance[0]))


def risks_from_moments(
    chain: Chain, rules: Mapping[str, Rule], steps: Sequence[int], step_time: float, at: Sequence[int] | None
) -> dict[str, Risk]:
    """The risk of every rule at every step of ``at``, from the joint moments of its buffers and the live iterate.

        b ← [M v] (b, θ)        Cov(b) ← [M v] Cov(b, θ) [M v]ᵀ        variance = (c, d) Cov(b, θ) (c, d)ᵀ

    Rules with the same schedule and number of buffers go through as one array; rules with equal labels share their
    moments.
    """
    groups: dict[tuple[UpdateSchedule, int], dict[str, Rule]] = {}
    for name, rule in rules.items():
        groups.setdefault((rule.schedule, len(rule.buffer_keys)), {})[name] = rule
    where = read_steps(steps, at)
    found: dict[str, Risk] = {}
    for group in groups.values():
        squared, variance = _group_moments(chain, list(group.values()), steps, step_time, where)
        for row, name in enumerate(group):
            curve = Risk(squared[row], variance[row])
            found[name] = Risk(float(squared[row, 0]), float(variance[row, 0])) if at is None else curve
    return {name: found[name] for name in rules}


def _group_moments(
    chain: Chain, rules: Sequence[Rule], steps: Sequence[int], step_time: float, at: Sequence[int]
) -> tuple[FloatArray, FloatArray]:
    """bias² and variance, each of shape (rules, len(at)), of rules that agree in schedule and number of buffers."""
    distinct: dict[Hashable, int] = {}
    member = [distinct.setdefault(rule.buffer_keys, len(distinct)) for rule in rules]
    heads = [rules[member.index(i)] for i in range(len(distinct))]
    state = _Moments(chain, len(heads), len(rules[0].buffer_keys))
    column = {step: [i for i, other in enumerate(at) if other == step] for step in at}
    squared, variance = np.empty((len(rules), len(at))), np.empty((len(rules), len(at)))

    transition = Transitions(chain, step_time)
    now = steps[0]
    for move in moves(rules[0], steps, at):
        step = steps[move.position]
        if step > now:
            state.advance(*transition(step - now))
            now = step
        if move.event.follows:
            state.follow()
        tick = move.tick
        after = state if tick is None else state.updated(_stack_updates(heads, tick))
        if move.event.updates:
            state = after
        if move.read:
            values = after.live(len(rules)) if tick is None else after.read(_stack_reads(rules, tick), member)
            for i in column[step]:
                squared[:, i], variance[:, i] = values
    return squared, variance


class _Moments:
    """Means and covariances of (b, θ) - μ* for u rules of r buffers: shapes (u, r+1, d) and (u, r+1, r+1, d)."""

    def __init__(self, chain: Chain, rules: int, buffers: int) -> None:
        self.mean = np.tile(chain.start, (rules, buffers + 1, 1))
        self.cov = np.zeros((rules, buffers + 1, buffers + 1, len(chain.start)))

    def advance(self, decay: FloatArray, noise: FloatArray) -> None:
        """The live iterate moves: θ ← ρ θ + ε. Modified in place."""
        self.mean[:, -1] *= decay
        self.cov[:, -1] *= decay
        self.cov[:, :, -1] *= decay
        self.cov[:, -1, -1] += noise

    def follow(self) -> None:
        """Buffers are set to the live iterate. Modified in place."""
        self.mean[:] = self.mean[:, -1:]
        self.cov[:] = self.cov[:, -1:, -1:]

    def updated(self, matrix: FloatArray) -> _Moments:
        """After b ← [M v] (b, θ); ``matrix`` is [M v], shape (u, r, r+1)."""
        count, size, _, dimension = self.cov.shape
        after = object.__new__(_Moments)
        after.mean = np.concatenate([matrix @ self.mean, self.mean[:, -1:]], axis=1)
        cross = (matrix @ self.cov.reshape(count, size, -1)).reshape(count, size - 1, size, dimension)
        both = matrix @ cross.swapaxes(1, 2).reshape(count, size, -1)
        after.cov = np.empty_like(self.cov)
        after.cov[:, :-1, :-1] = both.reshape(count, size - 1, size - 1, dimension)
        after.cov[:, :-1, -1] = after.cov[:, -1, :-1] = cross[:, :, -1]
        after.cov[:, -1, -1] = self.cov[:, -1, -1]
        return after

    def read(self, coefficients: FloatArray, member: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """bias² and variance of (c, d)·(b, θ); ``coefficients`` is (c, d), one row per rule."""
        bias = np.einsum("gi,gid->gd", coefficients, self.mean[member])
        trace = self.cov.sum(axis=-1)[member]
        return (bias**2).sum(axis=1), np.einsum("gi,gij,gj->g", coefficients, trace, coefficients)

    def live(self, rules: int) -> tuple[FloatArray, FloatArray]:
        """bias² and variance of the live iterate, once per rule."""
        bias, variance = (self.mean[0, -1] ** 2).sum(), self.cov[0, -1, -1].sum()
        return np.full(rules, bias), np.full(rules, variance)


def _stack_updates(rules: Sequence[Rule], tick: Tick) -> FloatArray:
    """[M v] of every rule, shape (u, r, r+1)."""
    size = len(rules[0].buffer_keys)
    numbers: list[float] = []
    for rule in rules:
        matrix, live = rule.update(tick)
        for row, gain in zip(matrix, live, strict=True):
            numbers.extend(row)
            numbers.append(gain)
    return np.array(numbers).reshape(len(rules), size, size + 1)


def _stack_reads(rules: Sequence[Rule], tick: Tick) -> FloatArray:
    """(c, d) of every rule, shape (g, r+1)."""
    return np.array([(*read.buffers, read.live) for read in (rule.read(tick) for rule in rules)])
