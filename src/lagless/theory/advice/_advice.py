"""Which averaging rule to use, if the loss were a known quadratic: the exact risk of many settings, and the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np

from lagless._validation import check_integer, check_number, require_integer
from lagless.rules import EMA, FloatArray, Rule, UpdateSchedule, trajectory_weights
from lagless.theory.advice._rule_grid import default_rules
from lagless.theory.trajectories import QuadraticSGD, Risk

Measure = Literal["loss", "distance"]
MEASURES: tuple[Measure, ...] = ("loss", "distance")


@dataclass(frozen=True)
class AveragingProblem:
    """A run of SGD at a constant learning rate on a quadratic whose spectrum is known.

        θ ← θ - lr (A(θ - μ*) + σξ)        eigenvalues of A spread evenly in log a over [a_min, a_max]

    Every eigen-direction counts alike, starts at the same distance from the minimum and gets the same noise.

    Args:
        curvature_min: a_min > 0.
        curvature_max: a_max ≥ a_min, below 2/lr.
        noise: σ > 0, the standard deviation of the gradient noise of one step, per direction.
        distance: |θ_0 - μ*| ≥ 0, per direction.
        lr: learning rate > 0. With lr = 1 curvatures are rates per optimizer step, a·lr, and the noise is that of one
            step.
        steps: T ≥ 1, optimizer steps.
        coordinates: ≥ 1, how many eigenvalues stand for the spectrum.

    Raises:
        ValueError: if an argument is out of range, or SGD would diverge.
    """

    curvature_min: float
    curvature_max: float
    noise: float
    distance: float
    lr: float
    steps: int
    coordinates: int = 16

    def __post_init__(self) -> None:
        for name in ("curvature_min", "curvature_max", "noise", "lr"):
            check_number(self, name, above=0.0, finite=True)
        check_number(self, "distance", minimum=0.0, finite=True)
        check_integer(self, "steps", minimum=1)
        check_integer(self, "coordinates", minimum=1)
        if self.curvature_max < self.curvature_min:
            raise ValueError(f"curvature_max={self.curvature_max:g} is below curvature_min={self.curvature_min:g}.")
        if self.lr * self.curvature_max >= 2.0:
            raise ValueError(
                f"lr·curvature_max = {self.lr * self.curvature_max:g}: SGD diverges from 2 on. Lower lr or "
                "curvature_max."
            )

    @property
    def curvatures(self) -> FloatArray:
        """The eigenvalues, shape (coordinates,), ascending."""
        return np.geomspace(self.curvature_min, self.curvature_max, self.coordinates)

    def process(self, measure: Measure) -> QuadraticSGD:
        """The run in coordinates whose squared distance from the minimum is ``measure``.

        ``"distance"`` is the mean of (θ - μ*)² over directions, ``"loss"`` the mean of ½a(θ - μ*)²: the loss above its
        minimum, per direction. Direction i is scaled by the root of its weight.
        """
        a = self.curvatures
        scale = np.sqrt((0.5 * a if measure == "loss" else np.ones_like(a)) / len(a))
        return QuadraticSGD(
            A=np.diag(a),
            mu=np.zeros_like(a),
            theta0=scale * self.distance,
            lr=self.lr,
            Sigma=np.diag(scale * self.noise),
        )


@dataclass(frozen=True)
class Setting:
    """A rule and its exact risk at the end of the run.

    Attributes:
        name: the call that makes the rule, or ``"live"``.
        rule: None for the live weights.
        copies: how many copies of the parameters the rule keeps; see :meth:`~lagless.Rule.buffer_keys`.
        loss: mean over directions of ½a(μ̂ - μ*)², in expectation.
        distance: mean over directions of (μ̂ - μ*)², in expectation.
    """

    name: str
    rule: Rule | None
    copies: int
    loss: Risk
    distance: Risk

    @property
    def family(self) -> str:
        """The class of the rule, or ``"live"``."""
        return "live" if self.rule is None else type(self.rule).__name__


@dataclass(frozen=True)
class Advice:
    """All settings that were compared, the best first.

    Attributes:
        problem: what was assumed.
        measure: what they are ordered by.
        settings: the settings.
    """

    problem: AveragingProblem
    measure: Measure
    settings: tuple[Setting, ...]

    def risk(self, setting: Setting) -> Risk:
        """The risk of ``setting`` in the chosen measure."""
        return getattr(setting, self.measure)

    def total(self, setting: Setting) -> float:
        """bias² + variance of ``setting`` in the chosen measure."""
        return float(self.risk(setting).total)

    @cached_property
    def recommended(self) -> Setting:
        """The setting with the fewest copies among those within 2 % of the lowest risk; of these the best."""
        near = [s for s in self.settings if self.total(s) <= 1.02 * self.total(self.settings[0])]
        return min(near, key=lambda setting: setting.copies)

    @cached_property
    def live(self) -> Setting:
        """The live weights, always among the settings."""
        return next(s for s in self.settings if s.rule is None)

    @cached_property
    def best_ema(self) -> Setting | None:
        """The best :class:`~lagless.EMA`, if there was one."""
        return next((s for s in self.settings if isinstance(s.rule, EMA)), None)

    @cached_property
    def best_of_families(self) -> tuple[Setting, ...]:
        """The best setting of every class of rules, the best first."""
        first: dict[str, Setting] = {}
        for setting in self.settings:
            first.setdefault(setting.family, setting)
        return tuple(first.values())

    def gain(self, over: Setting) -> float:
        """How many times lower the risk of :attr:`recommended` is than that of ``over``."""
        return self.total(over) / self.total(self.recommended)


def choose(
    problem: AveragingProblem,
    rules: Mapping[str, Rule] | None = None,
    *,
    measure: Measure = "loss",
    update_freq: int | None = None,
    copies: int = 10,
) -> Advice:
    """Compare averaging rules by their exact risk at the end of a run on a quadratic, and recommend one.

        E‖μ̂ - μ*‖²_W = Σ_i W_i [ (Σ_k w_k ρ_i^k (θ_0 - μ*))² + Var(Σ_k w_k θ_{k,i}) ],   ρ_i = 1 - lr·a_i,

    with w the rule's weights on the iterates and W the ``measure``. Exact for SGD at a constant learning rate on a
    quadratic with this spectrum and independent noise; nothing is simulated. On another loss, with a schedule, with
    momentum or an adaptive optimizer it is a guess, and the best of many settings in theory is one to try in
    practice, not one to trust.

    Args:
        problem: the run.
        rules: name → rule; None for :func:`default_rules`, a grid over all families.
        measure: ``"loss"``, the excess loss, or ``"distance"``, plain squared distance; see
            :meth:`AveragingProblem.process`.
        update_freq: for the default grid, optimizer steps between updates; None for at most 1,000 updates a run.
        copies: for the default grid, the most copies of the parameters that a rule may keep.

    Returns:
        Every setting and the live weights, ordered by ``measure``.

    Raises:
        ValueError: if an argument is out of range, or a rule never updates in the run.

    >>> problem = AveragingProblem(curvature_min=0.01, curvature_max=1.0, noise=1.0, distance=1.0, lr=0.1, steps=2000)
    >>> advice = choose(problem)
    >>> advice.recommended.family, advice.gain(advice.live) > 2
    ('BEMA', True)
    """
    _check_measure(measure)
    if rules is None:
        rules = default_rules(problem.steps, update_freq=update_freq, copies=copies)
    processes = {name: problem.process(name) for name in MEASURES}
    only_live = np.zeros((1, 2))
    only_live[0, 1] = 1.0
    found = [Setting("live", None, 0, *(_risks(processes[m], only_live, [0, problem.steps])[0] for m in MEASURES))]
    by_schedule = sorted(rules.items(), key=lambda item: _order(item[1].schedule))
    for schedule, members in groupby(by_schedule, key=lambda item: item[1].schedule):
        group = list(members)
        steps = update_steps(schedule, problem.steps)
        weights = np.stack([trajectory_weights(rule, steps) for _, rule in group])
        loss, distance = (_risks(processes[m], weights, steps) for m in MEASURES)
        found += [
            Setting(name, rule, len(rule.buffer_keys), *risks)
            for (name, rule), *risks in zip(group, loss, distance, strict=True)
        ]
    ordered = sorted(found, key=lambda setting: float(getattr(setting, measure).total))
    return Advice(problem, measure, tuple(ordered))


def risk_curve(problem: AveragingProblem, rule: Rule | None, at: Iterable[int], measure: Measure = "loss") -> Risk:
    """The exact risk of a rule (None: the live weights) at several steps of the run.

    Args:
        problem: the run.
        rule: the rule.
        at: steps in [1, T]; those before the rule's first update give NaN.
        measure: as in :func:`choose`.

    Returns:
        Arrays of shape (len(at),).

    Raises:
        ValueError: if a step is not an integer in [1, T], or ``measure`` is unknown.
    """
    _check_measure(measure)
    moments = [require_integer("at", step, minimum=1) for step in at]
    if late := [step for step in moments if step > problem.steps]:
        raise ValueError(
            f"at={late[0]}; steps must lie in [1, {problem.steps}], the horizon of the problem. Give it more steps."
        )
    process = problem.process(measure)
    squared, variance = np.full(len(moments), np.nan), np.full(len(moments), np.nan)
    for i, step in enumerate(moments):
        if rule is None:
            steps, weights = [0, step], np.array([[0.0, 1.0]])
        elif rule.schedule.count(step) == 0:
            continue
        else:
            steps = update_steps(rule.schedule, step)
            weights = trajectory_weights(rule, steps)[None]
        risk = _risks(process, weights, steps)[0]
        squared[i], variance[i] = risk.bias_squared, risk.variance
    return Risk(squared, variance)


def update_steps(schedule: UpdateSchedule, last: int) -> list[int]:
    """The steps whose iterates an average at step ``last`` can contain: 0, the end of burn-in, updates, the last."""
    return sorted({0, min(schedule.update_after, last), *schedule.update_steps(last), last})


def _risks(process: QuadraticSGD, weights: FloatArray, steps: list[int]) -> list[Risk]:
    risk = process.risk_of_weights(weights, steps=steps)
    pairs = zip(np.atleast_1d(risk.bias_squared), np.atleast_1d(risk.variance), strict=True)
    return [Risk(float(squared), float(variance)) for squared, variance in pairs]


def _order(schedule: UpdateSchedule) -> tuple[int, int, bool]:
    return schedule.update_after, schedule.update_freq, schedule.hold


def _check_measure(measure: str) -> None:
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}; it must be one of {', '.join(map(repr, MEASURES))}.")
