"""Which average of a run to use: predicted from its checkpoints, and checked on held-out text where there is some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lagless.checkpoints import StrPath, Trajectory, find_checkpoints
from lagless.lab.averages import LIVE, evaluate_averages
from lagless.lab.choose._increments import increment_products
from lagless.lab.choose._learning_rate import LearningRate, constant_rate, logged_rate, rate_of_increments
from lagless.lab.choose._motion import Motion, fit_motion
from lagless.lab.choose._progress import RunPath, path_of
from lagless.lab.choose._shortlist import shortlist
from lagless.lab.evaluation import Losses, Sequences, sequence_losses
from lagless.lab.statistics import Mean
from lagless.posthoc import Progress
from lagless.rules import FloatArray, Rule, effective_iterates, mean_age

DEFAULT = "DEMA 0.2"
"""What is recommended where nothing can be told: of the shortlist, the rule with the lowest mean regret on the
runs that the prediction was built on, three of AdamW and their beginnings."""

DRIFT_WEIGHT = 0.4
"""Fitted to the losses of averages of three runs of AdamW: at constant rates 0.25 and 0.41, decayed to 0 0.61. SGD on a
quadratic has 1; an adaptive optimizer has its noise where its own metric hides curvature."""

_LEAST = 6  # checkpoints; with fewer, drift and noise fit the same few numbers
_MISFIT = 0.5
_CLEARLY = 0.5  # times the misfit
_DECAYED = 0.1
_NO_NOISE = 0.2  # misfit above which noise may hide in what is not fitted
_UNRESOLVED = 0.3
_MATTERS = 0.1  # of the drift

Basis = Literal["measured", "predicted", "default"]


@dataclass(frozen=True)
class Option:
    """One rule of the shortlist.

    Attributes:
        name: short.
        rule: the rule.
        age: mean age of its weights in optimizer steps.
        iterates: how many checkpoints it amounts to against independent noise.
        noise: predicted change of the loss by averaging noise, in an unknown unit.
        drift: predicted change by lagging behind, in the same unit.
        measured: measured loss minus the live weights' in nats per token, on the half of the sequences that decides.
        confirmed: the same on the other half.
    """

    name: str
    rule: Rule
    age: float
    iterates: float
    noise: float
    drift: float
    measured: Mean | None = None
    confirmed: Mean | None = None

    @property
    def predicted(self) -> float:
        """Predicted loss minus the live weights', in the unknown unit."""
        return self.noise + self.drift


@dataclass(frozen=True)
class Choice:
    """What was found about a run.

    Attributes:
        best: the option to take; None for the live weights.
        basis: why: measured, predicted, or neither.
        options: the shortlist, best first.
        steps: of the checkpoints.
        rate: the learning rate that was assumed, and where it is from.
        path: progress of the run along θ_T - θ_0.
        motion: the fit.
        scale: nats per unit of the prediction, from the evaluation of ``scaled_by``; None without one.
        scaled_by: the name of that option.
        doubts: what could not be known, in sentences.
        drift_weight: as in :func:`predict`.
    """

    best: Option | None
    basis: Basis
    options: tuple[Option, ...]
    steps: tuple[int, ...]
    rate: LearningRate
    path: RunPath
    motion: Motion
    scale: float | None
    scaled_by: str | None
    doubts: tuple[str, ...]
    drift_weight: float

    @property
    def decayed(self) -> bool:
        """Whether the learning rate ended below a tenth of its peak."""
        return float(self.rate.at(np.array([self.steps[-1]]))[0]) <= _DECAYED


def choose_rule(
    run: StrPath | Sequence[StrPath] | Trajectory,
    held_out: Sequences | None = None,
    *,
    batch_size: int = 8,
    device: str | None = None,
    model: Any = None,
    memory: int = 2**30,
    progress: Progress | None = None,
    evaluated: Callable[[str], None] | None = None,
) -> Choice:
    """Choose an average of a run from the geometry of its checkpoints, or by evaluating the shortlist.

    Without held-out text, the rule with the lowest loss predicted by :meth:`Motion.change`; where nothing can be
    predicted, :data:`DEFAULT`. With held-out text every rule of the shortlist and the live weights are evaluated, so
    the choice is never worse than theirs: every second sequence decides, the others say what was gained.

    Args:
        run: a run folder, a list of checkpoints, or what :func:`lagless.checkpoints.find_checkpoints` found.
        held_out: text to evaluate on.
        batch_size: sequences at a time.
        device: where to evaluate; by default an accelerator if there is one.
        model: what to load averages into; by default the last checkpoint, as ``transformers`` loads it.
        memory: bytes for buffers while files are read.
        progress: called with the bytes read so far and in all.
        evaluated: called with the name of every average that was evaluated.

    Raises:
        CheckpointError: if checkpoints are missing or damaged.
        ValueError: if there are fewer than 3, two neighbours are the same, or ``held_out`` has fewer than 4 sequences.
    """
    trajectory = run if isinstance(run, Trajectory) else find_checkpoints(run)
    if held_out is not None and len(held_out.tokens) < 4:
        raise ValueError(f"{len(held_out.tokens)} held-out sequences; half of them decide, so give at least 4.")
    products = increment_products(trajectory, memory=memory, progress=progress)
    choice = predict(products, trajectory.steps, logged_rate(trajectory.checkpoints[-1].folder))
    if held_out is None:
        return choice
    losses: dict[str, Losses] = {}
    rules = {option.name: option.rule for option in choice.options}
    for found in evaluate_averages(
        trajectory, rules, lambda held: sequence_losses(held, held_out, batch_size), model=model, device=device
    ):
        losses[found.name] = found.result
        if evaluated is not None:
            evaluated(found.name)
    return measure(choice, losses)


def predict(
    products: FloatArray, steps: Sequence[int], logged: LearningRate | None = None, drift_weight: float = DRIFT_WEIGHT
) -> Choice:
    """Choose from the inner products of the increments of a run.

    Args:
        products: shape (N - 1, N - 1), as of :func:`increment_products`.
        steps: of the N checkpoints.
        logged: the learning rate, if known. If not, it is taken to be constant, or to be in proportion to the
            increments where that fits clearly better.
        drift_weight: curvature along the drift over that of the noise, in units of what SGD has: 1 is exact for SGD on
            a quadratic.
    """
    rate = constant_rate() if logged is None else logged
    motion = fit_motion(products, steps, rate)
    if logged is None:
        falling = rate_of_increments(products, steps)
        tried = fit_motion(products, steps, falling)
        if tried.misfit < _CLEARLY * motion.misfit:
            motion, rate = tried, falling
    rules = shortlist(steps)
    change = motion.change(np.array([weights for _, weights in rules.values()]))
    options = [
        Option(name, rule, mean_age(weights, steps), effective_iterates(weights), float(noise), float(drift))
        for (name, (rule, weights)), noise, drift in zip(
            rules.items(), change.noise, drift_weight * change.drift, strict=True
        )
    ]
    options.sort(key=lambda option: option.predicted)
    matters = float(np.abs(change.noise).max()) > _MATTERS * float(np.abs(change.drift).max())
    doubts, told = _doubts(motion, steps, rate, matters)
    best: Option | None = options[0] if options[0].predicted < 0.0 else None
    basis: Basis = "predicted"
    if told and best is None and motion.misfit > _NO_NOISE:
        told = False
        doubts.append(
            "No noise is seen that averaging would remove, but the fit misses "
            f"{motion.misfit:.0%} of the motion, in which some may hide. Give --data to find out."
        )
    if not told:
        best, basis = next((option for option in options if option.name == DEFAULT), options[0]), "default"
    return Choice(
        best,
        basis,
        options=tuple(options),
        steps=tuple(steps),
        rate=rate,
        path=path_of(products, steps),
        motion=motion,
        scale=None,
        scaled_by=None,
        doubts=tuple(doubts),
        drift_weight=drift_weight,
    )


def measure(choice: Choice, losses: Mapping[str, Losses]) -> Choice:
    """Return the choice after the shortlist was evaluated.

    The prediction's unit is fixed by the rule that was predicted best, so the others' predictions can be compared with
    what was measured.

    Args:
        choice: the prediction.
        losses: by the names of all options and ``"live"``, on the same sequences.
    """
    deciding, confirming = ({name: _part(of, first) for name, of in losses.items()} for first in (0, 1))
    options = tuple(
        replace(
            option,
            measured=deciding[option.name].difference(deciding[LIVE]),
            confirmed=confirming[option.name].difference(confirming[LIVE]),
        )
        for option in choice.options
    )
    reference = options[0]
    scale = None
    if choice.basis == "predicted" and reference.predicted < 0.0 and _value(reference) < 0.0:
        scale = _value(reference) / reference.predicted
    ordered = tuple(sorted(options, key=_value))
    return replace(
        choice,
        best=ordered[0] if _value(ordered[0]) < 0.0 else None,
        basis="measured",
        options=ordered,
        scale=scale,
        scaled_by=None if scale is None else reference.name,
    )


def _value(option: Option) -> float:
    assert option.measured is not None
    return option.measured.value


def _part(losses: Losses, first: int) -> Losses:
    return Losses(losses.nats[first::2], losses.targets[first::2])


def _doubts(motion: Motion, steps: Sequence[int], rate: LearningRate, noise_matters: bool) -> tuple[list[str], bool]:
    """Return what cannot be known, and whether anything can be."""
    doubts: list[str] = []
    told = len(steps) >= _LEAST and motion.misfit <= _MISFIT
    if len(steps) < _LEAST:
        doubts.append(
            f"There are {len(steps)} checkpoints; drift can be told from noise with {_LEAST} or more. Store them more "
            "often, or give --data."
        )
    elif motion.misfit > _MISFIT:
        doubts.append(
            f"Drift and noise on a quadratic miss {motion.misfit:.0%} of how the checkpoints move; nothing is "
            "predicted."
        )
    if rate.source == "increments":
        doubts.append(
            "The learning rate was not logged; that it falls is concluded from shorter and shorter steps between "
            "checkpoints."
        )
    if told and noise_matters and motion.unresolved > _UNRESOLVED:
        doubts.append(
            f"{motion.unresolved:.0%} of the noise is forgotten from one checkpoint to the next; averaging may gain "
            "more than predicted."
        )
    return doubts, told
