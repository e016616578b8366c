"""Weights on stored checkpoints that minimise a held-out loss.

With θ(w) = Σ_i w_i θ_i and Σ w = 1, one backward pass and one more read of the files give the slope in every weight,
∂L/∂w_i = <∇L(θ(w)), θ_i>. These slopes, the Gram matrix of the moves and the secants between evaluations make a
quadratic model of the loss, so that few evaluations suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lagless.checkpoints import Checkpoint, StrPath, Trajectory, find_checkpoints
from lagless.lab.averages import load_model
from lagless.lab.evaluation import Losses
from lagless.lab.learn._baselines import default_prior, rules_compared
from lagless.lab.learn._checks import refuse_copies, refuse_few_targets, refuse_nonfinite
from lagless.lab.learn._documents import Document, Part, Parts, split_documents
from lagless.lab.learn._journal import Journal
from lagless.lab.learn._learned import Comparison, Learned
from lagless.lab.learn._losses import ItemLoss, cross_entropy, part_losses
from lagless.lab.learn._modes import MODES, Floats, Mode, degrees_of_freedom
from lagless.lab.learn._search import Evaluation, Proposal, Search, Setting
from lagless.lab.learn._streamed import StreamedModel
from lagless.lab.learn._training_data import refuse_trained_on
from lagless.rules import Rule, rule_to_dict, trajectory_weights

RIDGES = (0.001, 0.01, 0.1)
TARGETS_PER_WEIGHT = 500
"""Targets of the fit part per weight below which learning is refused. As in Akaike's criterion, weights fitted on n
independent targets lose about 1/(2n) nats per target and weight on others: 0.001 nats at 500."""
LEAST_CHECKPOINTS = 3

Progress = Callable[[str, float | None], None]


class _Measured(NamedTuple):
    """One name and the weights it stands for."""

    name: str
    weights: Floats


def learn(
    run: StrPath | Sequence[StrPath] | Trajectory,
    documents: Iterable[Document] | Parts,
    *,
    loss: ItemLoss = cross_entropy,
    prior: Rule | None = None,
    modes: Sequence[Mode] = MODES,
    ridges: Sequence[float] = RIDGES,
    evaluations: int = 12,
    seed: int = 0,
    batch_size: int = 8,
    targets_per_weight: float = TARGETS_PER_WEIGHT,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**28,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Learned:
    """Learn weights on the checkpoints of a run from held-out loss, and report on documents that had no part in it.

    The weights minimise L(w) + ½ λ|w - w_prior|² on the fit part, for every mode and ridge λ; the one with the lowest
    loss on the choose part, of all that were evaluated, is reported on the report part. An evaluation is a forward and
    a backward pass over the parts that fit and choose, and two reads of the files however many there are. In memory
    are the model, two gradients, and ``memory`` bytes of buffers.

    Args:
        run: a run folder, a list of checkpoints, or what :func:`lagless.checkpoints.find_checkpoints` found.
        documents: held-out documents, to be split; or parts that are split already.
        loss: of the model on items of documents; see :data:`ItemLoss`.
        prior: the rule whose weights the ridge pulls towards, and where the search starts; by default
            ``EMA(half_life_fraction=0.05)``.
        modes: which weights are allowed; see :data:`MODES`.
        ridges: λ, in nats per target.
        evaluations: at most.
        seed: of the split.
        batch_size: items at a time.
        targets_per_weight: least targets of the fit part per weight.
        model: what sums are loaded into; by default the last checkpoint, as ``transformers`` loads it.
        device: where to evaluate; by default an accelerator if there is one.
        memory: bytes for buffers.
        state: the file of what was measured so far; if it exists, the search goes on from it.
        progress: called with what is being done, and the best loss on the choose part so far.

    Raises:
        CheckpointError: if checkpoints are missing, damaged, copies of each other, or do not fit the model.
        ValueError: if an argument is out of range, there is too little data, some of it is what the run was trained
            on, the loss is not finite at a checkpoint, memory runs out, or ``state`` is of another search.
    """
    trajectory = run if isinstance(run, Trajectory) else find_checkpoints(run)
    steps = trajectory.steps
    if len(steps) < LEAST_CHECKPOINTS:
        raise ValueError(
            f"run: {len(steps)} checkpoints (steps {', '.join(map(str, steps))}); weights are learned on "
            f"{LEAST_CHECKPOINTS} or more. Keep more of them while training (save_steps, save_total_limit)."
        )
    parts = documents if isinstance(documents, Parts) else split_documents(documents, seed)
    together = [*parts.fit.documents, *parts.choose.documents, *parts.report.documents]
    refuse_trained_on(trajectory.checkpoints[-1].path.parent, together)
    rule = prior or default_prior(steps)
    held = load_model(trajectory, device) if model is None else model.eval()
    learner = Learner(
        trajectory.checkpoints,
        [checkpoint.path.name for checkpoint in trajectory.checkpoints],
        parts,
        loss,
        held,
        batch_size=batch_size,
        memory=memory,
        state=state,
        identity={"prior": rule_to_dict(rule), "steps": list(steps)},
        progress=progress,
    )
    return learner.run(
        trajectory_weights(rule, steps),
        {name: trajectory_weights(each, steps) for name, each in rules_compared(steps).items()},
        modes=modes,
        ridges=ridges,
        evaluations=evaluations,
        targets_per_weight=targets_per_weight,
        steps=steps,
    )


class Learner:
    """Learns weights on checkpoints, whatever they are of; :func:`learn` is for those of a run.

    Args:
        checkpoints: N checkpoints with the same tensors.
        names: of the checkpoints.
        parts: the documents.
        loss: of the model on items.
        model: what sums are loaded into, in evaluation mode.
        batch_size: items at a time.
        memory: bytes for buffers.
        state: the file of what was measured so far, or None.
        identity: what else the results depend on.
        progress: called with what is being done, and the best loss on the choose part so far.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        names: Sequence[str],
        parts: Parts,
        loss: ItemLoss,
        model: nn.Module,
        *,
        batch_size: int = 8,
        memory: int = 2**28,
        state: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if len(checkpoints) < 2:
            raise ValueError(f"checkpoints: {len(checkpoints)} given; weights are learned on two or more.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be at least 1.")
        self._names, self._parts, self._loss, self._batch_size = list(names), parts, loss, batch_size
        self._model = StreamedModel(model, checkpoints, memory)
        self._bytes = sum(checkpoint.nbytes for checkpoint in checkpoints)
        self._progress, self._best = progress or (lambda _what, _best: None), math.inf
        self._identity = {
            "checkpoints": [[c.path.name, *_stamps(c)] for c in checkpoints],
            "data": {part.name: part.digest for part in (parts.fit, parts.choose, parts.report)},
            "loss": f"{getattr(loss, '__module__', '')}:{getattr(loss, '__qualname__', repr(type(loss)))}",
            "torch": torch.__version__,
            **(identity or {}),
        }
        self._state = state
        self._read: dict[str, int] = {}

    def run(
        self,
        prior: Floats,
        rules: Mapping[str, Floats],
        *,
        modes: Sequence[Mode] = MODES,
        ridges: Sequence[float] = RIDGES,
        evaluations: int = 12,
        targets_per_weight: float = TARGETS_PER_WEIGHT,
        steps: Sequence[int] | None = None,
    ) -> Learned:
        """Learn the weights, choose among the settings, and report.

        Args:
            prior: the weights to start from, shape (N,).
            rules: other weights by name, of which the best is compared with.
            modes: which weights are allowed.
            ridges: λ, in nats per target.
            evaluations: at most.
            targets_per_weight: least targets of the fit part per weight.
            steps: of the checkpoints, for the result.
        """
        settings = _settings(modes, ridges, evaluations)
        count = len(self._names)
        refuse_few_targets(self._parts.fit, count - 1, targets_per_weight)
        identity = {"modes": list(modes), "ridges": list(ridges), "prior weights": prior.tolist()}
        journal = Journal(self._state, self._identity | identity)
        self._read = {"evaluation": 0, "measurement": 0}
        last = np.eye(count)[-1]
        single = [_Measured(name, row) for name, row in zip(self._names, np.eye(count), strict=True)]
        losses = [self._measure(journal, self._parts.choose, *each).mean.value for each in single]
        refuse_nonfinite(self._names, losses)
        best_single = single[int(np.argmin(losses))]
        named = [_Measured(name, np.asarray(row)) for name, row in rules.items()]
        by_rule = [self._measure(journal, self._parts.choose, *each).mean.value for each in named]

        first, gram, fingerprints = self._evaluate(journal, 0, Proposal(prior, None, math.nan, False))
        refuse_copies(self._names, gram, fingerprints)
        if not (math.isfinite(first.fit) and math.isfinite(first.choose)):
            raise ValueError(
                f"the loss is {first.fit} on the fit part and {first.choose} on the choose part at the prior, where "
                "the search starts. Choose another prior, or leave out checkpoints of a run that diverged (--steps)."
            )
        search = Search(gram, prior, settings, _radius(gram, prior))
        search.add(first)
        seen = [first]
        while len(seen) < evaluations and (proposal := search.propose()) is not None:
            seen.append(self._evaluate(journal, len(seen), proposal)[0])
            search.add(seen[-1])
        chosen = min((e for e in seen if np.isfinite(e.choose)), key=lambda e: e.choose)

        compared = {
            "live": _Measured(self._names[-1], last),
            "best checkpoint": best_single,
            **({"best rule": named[int(np.argmin(by_rule))]} if named else {}),
            "prior": _Measured("prior", prior),
        }
        reported = self._measure(journal, self._parts.report, "learned", chosen.weights)
        comparisons = []
        for role, (name, weights) in compared.items():
            other = self._measure(journal, self._parts.report, name, weights)
            comparisons.append(Comparison(role, name, weights, other.mean, reported.difference(other)))
        setting = chosen.setting
        return Learned(
            names=tuple(self._names),
            steps=None if steps is None else tuple(steps),
            weights=chosen.weights,
            setting=setting,
            prior=prior,
            degrees_of_freedom=0.0
            if setting is None
            else degrees_of_freedom(search.hessian(), chosen.weights, setting.mode, setting.ridge),
            on_edge=chosen.on_edge,
            evaluations=tuple(seen),
            loss=reported.mean,
            comparisons=tuple(comparisons),
            parts=self._parts,
            fingerprints=tuple(fingerprints),
            reads=(self._read["evaluation"] / self._bytes, self._read["measurement"] / self._bytes),
        )

    def _measure(self, journal: Journal, part: Part, name: str, weights: Floats) -> Losses:
        """The loss of every document of a part, without gradients."""

        def measure() -> dict[str, Any]:
            before = self._model.bytes_read
            self._model.load(weights)
            found = part_losses(self._model.model, part, self._loss, self._batch_size, gradient=False)
            read = self._model.bytes_read - before
            return {"nats": found.nats.tolist(), "targets": found.targets.tolist(), "bytes": read}

        self._progress(f"{part.name}: {name}", self._best if math.isfinite(self._best) else None)
        found = journal.get(f"{part.name}: {name}", measure)
        self._read["measurement"] += found["bytes"]
        return Losses(*(torch.tensor(found[key], dtype=torch.float64, device="cpu") for key in ("nats", "targets")))

    def _evaluate(self, journal: Journal, number: int, proposal: Proposal) -> tuple[Evaluation, Floats, list[str]]:
        """The losses of both parts and their slopes; with the first one also the Gram matrix and fingerprints."""

        def measure() -> dict[str, Any]:
            before = self._model.bytes_read
            self._model.load(proposal.weights)
            losses, gradients = [], []
            for part in (self._parts.fit, self._parts.choose):
                losses.append(part_losses(self._model.model, part, self._loss, self._batch_size, gradient=True))
                gradients.append(self._model.take_gradient())
            slopes, gram, fingerprints = self._model.slopes(gradients, gram=number == 0)
            return {
                "bytes": self._model.bytes_read - before,
                "losses": [found.mean.value for found in losses],
                "slopes": [
                    (row / float(found.targets.sum())).tolist() for row, found in zip(slopes, losses, strict=True)
                ],
                **({"gram": gram.tolist(), "fingerprints": fingerprints} if number == 0 else {}),
            }

        self._progress(f"evaluation {number + 1}", self._best if math.isfinite(self._best) else None)
        found = journal.get(f"evaluation {number}", measure)
        self._read["evaluation"] += found["bytes"]
        (fit, choose), (fit_slopes, choose_slopes) = found["losses"], map(np.array, found["slopes"])
        self._best = min(self._best, choose)
        evaluation = Evaluation(*proposal, fit, fit_slopes, choose, choose_slopes)
        return evaluation, np.array(found.get("gram", [])), found.get("fingerprints", [])


def _settings(modes: Sequence[Mode], ridges: Sequence[float], evaluations: int) -> list[Setting]:
    if not modes or any(mode not in MODES for mode in modes):
        raise ValueError(f"modes={list(modes)}; give one or more of {', '.join(MODES)}.")
    if not ridges or not all(0.0 <= ridge < math.inf for ridge in ridges):
        raise ValueError(f"ridges={list(ridges)}; give one or more numbers from 0 on.")
    if evaluations < 2:
        raise ValueError(f"evaluations={evaluations}; it must be at least 2.")
    return [Setting(mode, float(ridge)) for mode in modes for ridge in ridges]


def _radius(gram: Floats, prior: Floats) -> float:
    """Half the root mean square distance of the checkpoints from the prior average."""
    moves = np.eye(len(prior)) - prior
    return 0.5 * math.sqrt(float(np.einsum("ij,jk,ik->", moves, gram, moves)) / len(prior))


def _stamps(checkpoint: Checkpoint) -> list[list[int]]:
    return [[file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.files]
