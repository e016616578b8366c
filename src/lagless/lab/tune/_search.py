"""The best rule and setting for a run, in few evaluations: every average is a known combination of the checkpoints.

With θ(w) = Σ_i w_i θ_i, one backward pass gives the slope of the loss in every weight,

    ∂L/∂w_i = <∇L(θ(w)), θ_i>

and so along every setting of every rule at once, since all of them differ in w alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lagless.checkpoints import StrPath, Trajectory, find_checkpoints
from lagless.lab.averages import load_model
from lagless.lab.environment import commit, machine, versions
from lagless.lab.evaluation import Losses, Sequences, sequence_losses
from lagless.lab.output import write_json
from lagless.lab.statistics import Mean
from lagless.lab.tune._loss import AverageLoss, Floats
from lagless.lab.tune._quadratic_model import QuadraticModel
from lagless.lab.tune._ranges import at_edge, rules_searched
from lagless.lab.tune._trust_region import TrustRegion
from lagless.posthoc import combine_checkpoints
from lagless.rules import Rule, rule_to_dict, trajectory_weights


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
        beyond: how many of them lie outside the trust region at the end, where the model of the loss is not believed.
        at_edge: hyperparameters of the best rule that lie at an end of what is searched.
        best_minus_start: test loss of the best rule minus that of the best start (as validation has it).
    """

    best: Rule
    candidates: tuple[Candidate, ...]
    trials: tuple[Trial, ...]
    considered: int
    best_minus_start: Mean
    beyond: int = 0
    at_edge: tuple[str, ...] = ()


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
    sequences. Then, again and again, the setting is evaluated that a quadratic model of the loss holds best among those
    of :data:`SEARCH_RANGES` in a trust region, for every kind of rule at once, until that is one already evaluated.

    Args:
        run: a run folder, a list of checkpoints, or what :func:`lagless.posthoc.find_checkpoints` found. The
            checkpoints are held in memory in float32.
        starts: rules by name; what :data:`SEARCH_RANGES` names is searched, their kind and the rest stay as they are.
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
    searched = (rule for start in starts.values() for rule in rules_searched(start))
    rules = list(dict.fromkeys([*starts.values(), *searched]))
    live = np.eye(len(trajectory.steps))[-1]
    weights = np.array([trajectory_weights(rule, trajectory.steps) for rule in rules])
    held = load_model(trajectory.checkpoints[-1], device) if model is None else model.eval()
    loss = AverageLoss(held, combine_checkpoints(trajectory.checkpoints, np.eye(len(live))), validation, batch_size)
    gram = loss.gram()
    surrogate, trials = QuadraticModel(gram), {}

    def evaluate(rule: Rule | None, row: Floats) -> None:
        value, slopes = loss(row)
        surrogate.add(row, value, slopes)
        trials[rule] = Trial(rule, value)
        if progress is not None:
            progress(trials[rule])

    evaluate(None, live)
    for rule, row in zip(dict.fromkeys(starts.values()), weights, strict=False):
        evaluate(rule, row)

    def named(rule: Rule | None) -> float:
        return trials[rule].loss

    def combination(rule: Rule | None) -> Floats:
        return live if rule is None else weights[rules.index(rule)]

    region = TrustRegion(gram, np.array([combination(rule) for rule in trials]))
    while len(trials) < evaluations:
        ahead = min(trials, key=named)
        inside = region.holds(weights, combination(ahead))
        predicted = np.where(inside, surrogate.predict(weights), np.inf)
        chosen = int(np.argmin(predicted))
        if not inside.any() or rules[chosen] in trials:
            break
        evaluate(rules[chosen], weights[chosen])
        region.adapt(named(ahead) - named(rules[chosen]), named(ahead) - float(predicted[chosen]))

    best = min((rule for rule in trials if rule is not None), key=named)
    best_start = min(starts, key=lambda name: named(starts[name]))
    shown: dict[str, Rule | None] = {"live": None, **starts, "best": best}
    found: dict[str, Losses] = {}
    for name, rule in shown.items():
        loss.load(combination(rule))
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
        beyond=int((~region.holds(weights, combination(min(trials, key=named)))).sum()),
        at_edge=at_edge(best),
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
            "beyond": found.beyond,
            "at_edge": list(found.at_edge),
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
        },
    )
