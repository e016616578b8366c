"""The search for weights on checkpoints, from the first measurement to the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lagless.checkpoints import Checkpoint
from lagless.lab.evaluation import Losses
from lagless.lab.learn._checks import refuse_copies, refuse_few_targets, refuse_nonfinite
from lagless.lab.learn._documents import Part, Parts
from lagless.lab.learn._journal import Journal
from lagless.lab.learn._learned import Comparison, Learned
from lagless.lab.learn._losses import ItemLoss, part_losses
from lagless.lab.learn._modes import MODES, Floats, Mode, degrees_of_freedom
from lagless.lab.learn._search import Evaluation, Proposal, Search, Setting
from lagless.lab.learn._streamed import StreamedModel

RIDGES = (0.001, 0.01, 0.1)
TARGETS_PER_WEIGHT = 500
"""Targets of the fit part per weight below which learning is refused. As in Akaike's criterion, weights fitted on n
independent targets lose about 1/(2n) nats per target and weight on others: 0.001 nats at 500."""

Progress = Callable[[str, float | None], None]


class _Measured(NamedTuple):
    """One name and the weights it stands for."""

    name: str
    weights: Floats


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
        groups: regular expressions on names of tensors, by the name of a group that has weights of its own.
        tensors: the model's tensors by their names in the checkpoints; by default its state dict.
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
        groups: Mapping[str, str] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        if len(checkpoints) < 2:
            raise ValueError(f"checkpoints: {len(checkpoints)} given; weights are learned on two or more.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be at least 1.")
        self._names, self._parts, self._loss, self._batch_size = list(names), parts, loss, batch_size
        self._model = StreamedModel(model, checkpoints, memory, groups=groups, tensors=tensors)
        self._groups = self._model.groups
        self._bytes = sum(checkpoint.nbytes for checkpoint in checkpoints)
        self._progress, self._best = progress or (lambda _what, _best: None), math.inf
        self._identity = {
            "checkpoints": [[c.path.name, *_stamps(c)] for c in checkpoints],
            "data": {part.name: part.digest for part in (parts.fit, parts.choose, parts.report)},
            "loss": f"{getattr(loss, '__module__', '')}:{getattr(loss, '__qualname__', repr(type(loss)))}",
            "torch": torch.__version__,
            **({"groups": self._groups.patterns} if self._groups.patterns else {}),
            **(identity or {}),
        }
        self._state = state
        self._read: dict[str, int] = {}

    def run(
        self,
        prior: Floats,
        rules: Mapping[str, Mapping[str, Floats]],
        *,
        modes: Sequence[Mode] = MODES,
        ridges: Sequence[float] = RIDGES,
        evaluations: int = 12,
        targets_per_weight: float = TARGETS_PER_WEIGHT,
        steps: Sequence[int] | None = None,
        decays: Callable[[Floats], Mapping[str, Floats]] | None = None,
    ) -> Learned:
        """Learn the weights, choose among the settings, and report.

        Args:
            prior: the weights to start from, shape (N,), in every group.
            rules: other weights, shape (N,), by role and name; of each role the best is compared with.
            modes: which weights are allowed.
            ridges: λ, in nats per target.
            evaluations: at most.
            targets_per_weight: least targets of the fit part per weight.
            steps: of the checkpoints, for the result.
            decays: other weights by name that follow from those learned, to be reported on. Without groups only.
        """
        settings = _settings(modes, ridges, evaluations)
        count, groups = len(self._names), len(self._groups.names)
        refuse_few_targets(self._parts.fit, (count - 1) * groups, targets_per_weight)
        identity = {"modes": list(modes), "ridges": list(ridges), "prior weights": prior.tolist()}
        journal = Journal(self._state, self._identity | identity)
        self._read = {"evaluation": 0, "measurement": 0}
        prior = np.tile(prior, groups)
        single = [_Measured(name, np.tile(row, groups)) for name, row in zip(self._names, np.eye(count), strict=True)]
        losses = [self._measure(journal, self._parts.choose, *each).mean.value for each in single]
        refuse_nonfinite(self._names, losses)
        compared = {} if steps is None else {"live": single[-1]}
        compared["best checkpoint"] = single[int(np.argmin(losses))]
        for role, weights_by_name in rules.items():
            named = [_Measured(name, np.tile(row, groups)) for name, row in weights_by_name.items()]
            by_rule = [self._measure(journal, self._parts.choose, *each).mean.value for each in named]
            compared[role] = named[int(np.argmin(by_rule))]
        compared["prior"] = _Measured("prior", prior)

        first, gram, fingerprints = self._evaluate(journal, 0, Proposal(prior, None, math.nan, False))
        refuse_copies(self._names, gram.reshape(groups, count, groups, count).sum(axis=(0, 2)), fingerprints)
        if not (math.isfinite(first.fit) and math.isfinite(first.choose)):
            raise ValueError(
                f"the loss is {first.fit} on the fit part and {first.choose} on the choose part at the prior, where "
                "the search starts. Choose another prior, or leave out checkpoints of a run that diverged (--steps)."
            )
        search = Search(gram, prior, settings, _radius(gram, prior, groups), groups)
        search.add(first)
        seen = [first]
        while len(seen) < evaluations and (proposal := search.propose()) is not None:
            seen.append(self._evaluate(journal, len(seen), proposal)[0])
            search.add(seen[-1])
        chosen = min((e for e in seen if np.isfinite(e.choose)), key=lambda e: e.choose)

        reported = self._measure(journal, self._parts.report, "learned", chosen.weights)

        def compare(role: str, name: str, weights: Floats) -> Comparison:
            other = self._measure(journal, self._parts.report, name, weights)
            return Comparison(role, name, weights, other.mean, reported.difference(other))

        comparisons = tuple(compare(role, *named) for role, named in compared.items())
        stretched = decays(chosen.weights) if decays is not None and groups == 1 else {}
        setting = chosen.setting
        return Learned(
            names=tuple(self._names),
            steps=None if steps is None else tuple(steps),
            weights=chosen.weights,
            setting=setting,
            prior=prior,
            degrees_of_freedom=0.0
            if setting is None
            else degrees_of_freedom(search.hessian(), chosen.weights, setting.mode, setting.ridge, groups),
            on_edge=chosen.on_edge,
            evaluations=tuple(seen),
            loss=reported.mean,
            comparisons=comparisons,
            decays=tuple(compare("decay", name, weights) for name, weights in stretched.items()),
            parts=self._parts,
            fingerprints=tuple(fingerprints),
            groups=self._groups.patterns,
            group_names=self._groups.names,
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


def _radius(gram: Floats, prior: Floats, groups: int) -> float:
    """Half the root mean square distance of the checkpoints from the prior average."""
    count = len(prior) // groups
    moves = np.tile(np.eye(count), groups) - prior
    return 0.5 * math.sqrt(float(np.einsum("ij,jk,ik->", moves, gram, moves)) / count)


def _stamps(checkpoint: Checkpoint) -> list[list[int]]:
    return [[file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.files]
