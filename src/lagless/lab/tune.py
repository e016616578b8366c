"""The best rule and setting for a run, in few evaluations: every average is a known combination of the checkpoints.

With θ(w) = Σ_i w_i θ_i, one backward pass gives the slope of the loss in every weight,

    ∂L/∂w_i = <∇L(θ(w)), θ_i>

and so along every setting of every rule at once, since all of them differ in w alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lagless.checkpoints import StrPath, Trajectory, find_checkpoints
from lagless.lab._cross_entropy import IGNORED, cross_entropy_by_sequence
from lagless.lab._environment import commit, machine, versions
from lagless.lab._output import write_json
from lagless.lab.averages import State, load_model, load_weights, weighted_sum
from lagless.lab.evaluation import Losses, Sequences, sequence_losses
from lagless.lab.statistics import Mean
from lagless.posthoc import combine_checkpoints
from lagless.rules import EMA, Rule, rule_to_dict, trajectory_weights

Floats = NDArray[np.float64]

_INDEPENDENT, _CONVEX = 1e-8, 1e-2


@dataclass(frozen=True)
class Axis:
    """A setting that is searched: ``points`` values from ``low`` to ``high``, evenly or by equal factors."""

    low: float
    high: float
    logarithmic: bool = False
    points: int = 41

    @property
    def values(self) -> list[float]:
        """All values."""
        space = np.geomspace if self.logarithmic else np.linspace
        return [float(f"{value:.4g}") for value in space(self.low, self.high, self.points)]


AXES: Mapping[str, Axis] = {
    "ema_power": Axis(0.0, 1.0),
    "bias_power": Axis(0.05, 5.0, logarithmic=True),
    "half_life_fraction": Axis(0.01, 0.9, logarithmic=True),
    "relative_width": Axis(0.02, 0.28, logarithmic=True),
}
"""What is searched where a rule has it as a finite number. The rest of a rule stays as it is."""


@dataclass(frozen=True)
class Trial:
    """One rule that was evaluated on the validation sequences; None for the live weights."""

    rule: Rule | None
    loss: float


@dataclass(frozen=True)
class Candidate:
    """A rule on the sequences that the search did not see.

    Attributes:
        name: ``"live"``, ``"best"``, or the name of a rule that the search started from.
        rule: None for live.
        validation: its loss on the validation sequences.
        test: its loss on the test sequences.
        difference: that loss minus the live weights', paired by sequence.
    """

    name: str
    rule: Rule | None
    validation: float
    test: Mean
    difference: Mean


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` found.

    Attributes:
        best: the rule with the lowest validation loss.
        candidates: live, the rules the search started from, and the best, on the test sequences.
        trials: what was evaluated on validation, in order.
        considered: how many settings there were to choose from.
        best_minus_start: test loss of the best rule minus that of the best start (as validation has it).
    """

    best: Rule
    candidates: tuple[Candidate, ...]
    trials: tuple[Trial, ...]
    considered: int
    best_minus_start: Mean


def tune(
    run: StrPath | Sequence[StrPath] | Trajectory,
    starts: Mapping[str, Rule],
    validation: Sequences,
    test: Sequences,
    *,
    evaluations: int = 12,
    batch_size: int = 8,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[Trial], None] | None = None,
) -> Tuned:
    """Find the best averaging rule and setting on a validation set, and report on sequences the search did not see.

    The live weights and the starts are evaluated first, each by one forward and one backward pass over the validation
    sequences. Then, again and again, the setting is evaluated that a quadratic model of the loss holds best among all
    of :data:`AXES`, for every kind of rule at once, until that is one already evaluated.

    Args:
        run: a run folder, a list of checkpoints, or what :func:`lagless.posthoc.find_checkpoints` found. The
            checkpoints are held in memory in float32.
        starts: rules by name; what :data:`AXES` names is searched, their kind and the rest stay as they are.
        validation: what the search sees.
        test: what it does not.
        evaluations: on validation at most, of live and the starts, too.
        batch_size: sequences at a time.
        model: what to load averages into; by default the last checkpoint, as ``transformers`` loads it.
        device: where to evaluate; by default an accelerator if there is one.
        progress: called with every trial.

    Raises:
        CheckpointError: if checkpoints are missing or damaged, are adapters, or do not fit the model.
        ValueError: if there is no start, too few evaluations, or a rule makes no update in the run.
    """
    if not starts:
        raise ValueError("starts: the mapping is empty; give at least one rule.")
    if evaluations <= len(starts):
        raise ValueError(
            f"evaluations={evaluations}; it must be at least {len(starts) + 1}, one for live and each start."
        )
    trajectory = run if isinstance(run, Trajectory) else find_checkpoints(run)
    rules = list(dict.fromkeys([*starts.values(), *(rule for start in starts.values() for rule in settings(start))]))
    live = np.eye(len(trajectory.steps))[-1]
    weights = np.array([trajectory_weights(rule, trajectory.steps) for rule in rules])
    held = load_model(trajectory, device) if model is None else model.eval()
    loss = AverageLoss(held, combine_checkpoints(trajectory.checkpoints, np.eye(len(live))), validation, batch_size)
    surrogate, trials = QuadraticModel(loss.gram()), {}

    def evaluate(rule: Rule | None, row: Floats) -> None:
        value, slopes = loss(row)
        surrogate.add(row, value, slopes)
        trials[rule] = Trial(rule, value)
        if progress is not None:
            progress(trials[rule])

    evaluate(None, live)
    for rule, row in zip(dict.fromkeys(starts.values()), weights, strict=False):
        evaluate(rule, row)
    while len(trials) < evaluations:
        chosen = int(np.argmin(surrogate.predict(weights)))
        if rules[chosen] in trials:
            break
        evaluate(rules[chosen], weights[chosen])

    def named(rule: Rule | None) -> float:
        return trials[rule].loss

    best = min((rule for rule in trials if rule is not None), key=named)
    best_start = min(starts, key=lambda name: named(starts[name]))
    shown: dict[str, Rule | None] = {"live": None, **starts, "best": best}
    found: dict[str, Losses] = {}
    for name, rule in shown.items():
        loss.load(live if rule is None else weights[rules.index(rule)])
        found[name] = sequence_losses(held, test, batch_size)
    return Tuned(
        best=best,
        candidates=tuple(
            Candidate(name, rule, named(rule), found[name].mean, found[name].difference(found["live"]))
            for name, rule in shown.items()
        ),
        trials=tuple(trials.values()),
        considered=len(rules),
        best_minus_start=found["best"].difference(found[best_start]),
    )


def write_tuned(path: Path, found: Tuned) -> None:
    """Write what was found as JSON, at once or not at all."""

    def rule(of: Trial | Candidate) -> dict[str, Any] | None:
        return None if of.rule is None else rule_to_dict(of.rule)

    write_json(
        path,
        {
            "format": 1,
            "best": rule_to_dict(found.best),
            "best_minus_start": asdict(found.best_minus_start),
            "candidates": [{**asdict(one), "rule": rule(one)} for one in found.candidates],
            "trials": [{**asdict(one), "rule": rule(one)} for one in found.trials],
            "considered": found.considered,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
        },
    )


def settings(start: Rule) -> Iterator[Rule]:
    """``start`` with every combination of what :data:`AXES` has for it."""
    given = vars(start)
    names = [name for name in AXES if isinstance(given.get(name), int | float) and math.isfinite(given[name])]
    if isinstance(start, EMA) and any(given[name] is not None for name in ("decay", "half_life", "half_life_fraction")):
        names = [name for name in names if name != "ema_power"]  # the gain is set in another way
    for values in itertools.product(*(AXES[name].values for name in names)):
        yield replace(start, **dict(zip(names, values, strict=True)))  # type: ignore[type-var]


class AverageLoss:
    """The loss of combinations of held checkpoints as a function of their weights, with its gradient.

    Args:
        model: what the combinations are loaded into.
        states: N checkpoints.
        sequences: what the loss is measured on.
        batch_size: sequences at a time.
    """

    def __init__(self, model: nn.Module, states: Sequence[State], sequences: Sequences, batch_size: int = 8) -> None:
        self._model, self._states, self._sequences, self._batch_size = model, states, sequences, batch_size
        parameters = dict(model.named_parameters(remove_duplicate=False))
        once = {id(parameters[name]): name for name in states[-1] if name in parameters}  # tied ones count once
        self._parameters = {name: parameters[name] for name in once.values()}

    def load(self, weights: Floats) -> None:
        """Put Σ_i w_i θ_i into the model."""
        load_weights(self._model, weighted_sum(self._states, weights))

    def __call__(self, weights: Floats) -> tuple[float, Floats]:
        """L(θ(w)) in nats per token, and ∂L/∂w_i = <∇L, θ_i>, shape (N,)."""
        self.load(weights)
        tokens, labels = self._sequences.tokens, self._sequences.labels
        targets = float((labels[:, 1:] != IGNORED).sum())
        self._model.zero_grad(set_to_none=True)
        total = 0.0
        for nats, _ in cross_entropy_by_sequence(self._model, tokens, labels, self._batch_size):
            part = nats.sum() / targets
            part.backward()
            total += float(part.detach())
        slopes = np.zeros(len(self._states))
        for name, parameter in self._parameters.items():
            if (gradient := parameter.grad) is not None:
                slopes += [float((gradient * state[name].to(gradient.device)).sum()) for state in self._states]
        self._model.zero_grad(set_to_none=True)
        return total, slopes

    def gram(self) -> Floats:
        """<θ_i - θ_N, θ_j - θ_N>, shape (N, N)."""
        total = np.zeros((len(self._states), len(self._states)))
        for name in self._parameters:
            moved = torch.stack([(state[name] - self._states[-1][name]).flatten() for state in self._states])
            total += (moved @ moved.T).double().numpy()
        return total


class QuadraticModel:
    """A quadratic model of the loss in the weights on checkpoints, around the best combination seen.

    With w* that combination, s_k = w_k - w* the steps to the others and y_k the differences of their gradients,

        m(w) = L + g·(w - w*) + ½ (w - w*)ᵀ H (w - w*)
        H    = B - B Sᵀ (S B Sᵀ)⁺ S B + Yᵀ M⁺ Y        B = h·Gram        M = ½ (S Yᵀ + Y Sᵀ)

    which is BFGS for all pairs at once, starting from one curvature h in every direction of parameter space. It is
    exact on the span of the steps where the loss is quadratic.

    Args:
        gram: <θ_i - θ_N, θ_j - θ_N>, shape (N, N).

    Reference:
        R. B. Schnabel, Quasi-Newton methods using multiple secant equations, CU-CS-247-83, University of Colorado
        (1983).
    """

    def __init__(self, gram: Floats) -> None:
        self._gram = gram
        self._seen: list[tuple[Floats, float, Floats]] = []

    def add(self, weights: Floats, loss: float, slopes: Floats) -> None:
        """Learn the loss and its gradient at ``weights``."""
        self._seen.append((weights, loss, slopes))

    def predict(self, weights: Floats) -> Floats:
        """The modelled losses of combinations, shape (M, N) → (M,)."""
        best, loss, slopes = min(self._seen, key=lambda seen: seen[1])
        moved = weights - best
        return loss + moved @ slopes + 0.5 * ((moved @ self._hessian(best, slopes)) * moved).sum(axis=1)

    def _hessian(self, best: Floats, slopes: Floats) -> Floats:
        others = [seen for seen in self._seen if seen[0] is not best]
        if not others:
            return self._gram
        steps = np.array([weights - best for weights, _, _ in others])
        changes = np.array([other - slopes for _, _, other in others])
        # Steps of unit length that are independent: what differs less is rounding, or not quadratic.
        lengths, mix = np.linalg.eigh(steps @ self._gram @ steps.T)
        kept = lengths > _INDEPENDENT * lengths[-1]
        mix = mix[:, kept] / np.sqrt(lengths[kept])
        steps, changes = mix.T @ steps, mix.T @ changes
        curvatures, axes = np.linalg.eigh((steps @ changes.T + changes @ steps.T) / 2.0)
        if not (curvatures > 0.0).any():
            return self._gram
        typical = float(np.median(curvatures[curvatures > 0.0]))
        convex = curvatures > _CONVEX * typical  # where the loss is not convex, the typical curvature stands in
        steps, changes = axes[:, convex].T @ steps, axes[:, convex].T @ changes
        ahead = typical * steps @ self._gram
        return (
            typical * self._gram
            - ahead.T @ np.linalg.pinv(ahead @ steps.T) @ ahead
            + changes.T @ (changes / curvatures[convex, None])
        )
