"""Where to evaluate next: a quadratic model within a trust region, one for every ridge and mode.

The loss of the fit part decides the weights of each setting; that of the choose part decides which setting is next.
All of this is a function of what was evaluated so far, so a search that was stopped goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lagless.lab.learn._modes import Floats, Mode, is_feasible, minimum
from lagless.lab.tune import QuadraticModel

_STEP = 1e-6  # nats per target; a smaller expected gain is not worth an evaluation
_SHRINK, _GROW = 0.25, 0.75  # shares of the expected gain; Nocedal and Wright, Numerical Optimization, algorithm 4.1
_DAMPING, _HALVINGS = 1e8, 24  # damping relative to the curvature: its range, and how finely it is found


@dataclass(frozen=True)
class Setting:
    """One way to fit: which weights are allowed, and how strongly they are pulled towards the prior.

    Attributes:
        mode: which weights are allowed.
        ridge: λ of the penalty ½ λ |w - w_prior|², in nats per target.
    """

    mode: Mode
    ridge: float


@dataclass(frozen=True)
class Evaluation:
    """What was found at one set of weights.

    Attributes:
        weights: shape (N,).
        setting: whose minimum these were thought to be; None for where the search starts.
        expected: what the model thought the fit part's loss would be; NaN at the start.
        on_edge: whether the trust region kept the weights from where the model's minimum is.
        fit: loss of the fit part per target.
        fit_slopes: <∇L, θ_i - θ_N>, shape (N,).
        choose: loss of the choose part.
        choose_slopes: its slopes.
    """

    weights: Floats
    setting: Setting | None
    expected: float
    on_edge: bool
    fit: float
    fit_slopes: Floats
    choose: float
    choose_slopes: Floats


class Proposal(NamedTuple):
    """Weights to evaluate next."""

    weights: Floats
    setting: Setting | None
    expected: float
    on_edge: bool


class Search:
    """The evaluations so far, and what they make of the loss.

    Args:
        gram: <θ_i - θ_N, θ_j - θ_N>, shape (N, N).
        prior: the weights that the ridge pulls towards, where the search starts.
        settings: all ways to fit that may be tried.
        radius: the distance in parameter space within which the first model is trusted.
        groups: of tensors, in each of which the weights sum to 1; weights are those of one group after another.
    """

    def __init__(
        self, gram: Floats, prior: Floats, settings: Sequence[Setting], radius: float, groups: int = 1
    ) -> None:
        self._groups = groups
        self._gram, self._prior, self._settings, self._radius = gram, prior, list(settings), radius
        # Where nothing is known the loss is taken to curve half as it does in parameter space, half as in the weights:
        # what tells checkpoints apart is drift, which the Gram matrix is made of, and noise, which is independent and
        # about as much in each of them.
        self._base = gram + np.trace(gram) / len(gram) * np.eye(len(gram))
        self._fit, self._choose = QuadraticModel(self._base), QuadraticModel(self._base)
        self._seen: list[Evaluation] = []

    def add(self, found: Evaluation) -> None:
        """Learn from an evaluation. Where the loss is not finite, the model is trusted less far and learns nothing."""
        if not (np.isfinite(found.fit) and np.isfinite(found.choose)):
            self._radius *= 0.25
            return
        if found.setting is not None:
            self._adjust(found, found.setting)
        self._seen.append(found)
        self._fit.add(found.weights, found.fit, found.fit_slopes)
        self._choose.add(found.weights, found.choose, found.choose_slopes)

    def propose(self) -> Proposal | None:
        """Return what to evaluate next; None if no setting has anything left to gain."""
        if not self._seen:
            return Proposal(self._prior, None, float("nan"), False)
        found = [proposal for setting in self._settings if (proposal := self._of(setting)) is not None]
        if not found:
            return None
        if len(self._seen) == 1:
            return found[0]
        return found[int(np.argmin(self._choose.predict(np.array([proposal.weights for proposal in found]))))]

    def hessian(self) -> Floats:
        """Return the model's second derivatives of the fit part's loss, shape (N, N)."""
        return self._fit.expansion()[3]

    def _of(self, setting: Setting) -> Proposal | None:
        """The minimum of the model for one setting, within the trust region around the best weights it allows."""
        best, loss, slopes, hessian = self._fit.expansion()
        count = len(best)
        if len(self._seen) == 1:
            # Nothing is known of the curvature yet: it is taken to be what makes the first step as long as the radius.
            downhill = minimum(self._base, self._base @ best - slopes, "free", self._groups) - best
            steepness = self._distance(downhill, np.zeros(count))
            hessian = hessian * (steepness / self._radius)
        curved = hessian + setting.ridge * np.eye(count)
        linear = hessian @ best - slopes + setting.ridge * self._prior
        centre = self._centre(setting)
        found, on_edge = minimum(curved, linear, setting.mode, self._groups), len(self._seen) == 1
        if self._distance(found, centre) > self._radius:
            on_edge = True
            scale = np.trace(hessian) / max(np.trace(self._gram), np.finfo(np.float64).tiny)
            low, high = np.log(scale / _DAMPING), np.log(scale * _DAMPING)
            for _ in range(_HALVINGS):  # towards the least damping that keeps within the region
                middle = 0.5 * (low + high)
                tried = self._damped(curved, linear, centre, float(np.exp(middle)), setting.mode)
                low, high = (middle, high) if self._distance(tried, centre) > self._radius else (low, middle)
            found = self._damped(curved, linear, centre, float(np.exp(high)), setting.mode)
        moved = found - best
        expected = float(loss + moved @ slopes + 0.5 * moved @ hessian @ moved)
        now = min((e.fit + self._penalty(e.weights, setting) for e in self._allowed(setting)), default=np.inf)
        if now - expected - self._penalty(found, setting) < _STEP:
            return None
        return Proposal(found, setting, expected, on_edge)

    def _damped(self, curved: Floats, linear: Floats, centre: Floats, damping: float, mode: Mode) -> Floats:
        return minimum(curved + damping * self._gram, linear + damping * self._gram @ centre, mode, self._groups)

    def _allowed(self, setting: Setting) -> list[Evaluation]:
        return [e for e in self._seen if is_feasible(e.weights, setting.mode, self._groups)]

    def _centre(self, setting: Setting) -> Floats:
        """The best weights so far that the mode allows; if there are none, those nearest to the prior."""
        if allowed := self._allowed(setting):
            return min(allowed, key=lambda e: e.fit + self._penalty(e.weights, setting)).weights
        return minimum(np.eye(len(self._prior)), self._prior, setting.mode, self._groups)

    def _adjust(self, found: Evaluation, setting: Setting) -> None:
        """Trust the model as far as it was right."""
        if not (allowed := self._allowed(setting)):
            return
        before = min(e.fit + self._penalty(e.weights, setting) for e in allowed)
        after = before - self._penalty(found.weights, setting)
        if after - found.fit < _SHRINK * (after - found.expected):
            self._radius = 0.5 * min(self._distance(found.weights, self._centre(setting)), self._radius)
        elif after - found.fit > _GROW * (after - found.expected) and found.on_edge:
            self._radius *= 2.0

    def _penalty(self, weights: Floats, setting: Setting) -> float:
        return 0.5 * setting.ridge * float(((weights - self._prior) ** 2).sum())

    def _distance(self, one: Floats, other: Floats) -> float:
        moved = one - other
        return float(np.sqrt(max(moved @ self._gram @ moved, 0.0)))
