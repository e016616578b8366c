"""Weights on stored checkpoints that minimise a held-out loss.

With θ(w) = Σ_i w_i θ_i and Σ w = 1, one backward pass and one more read of the files give the slope in every weight,
∂L/∂w_i = <∇L(θ(w)), θ_i>. These slopes, the Gram matrix of the moves and the secants between evaluations make a
quadratic model of the loss, so that few evaluations suffice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lagless.checkpoints import Models, StrPath, Trajectory
from lagless.lab.learn._documents import Document, Parts, split_documents
from lagless.lab.learn._learned import Learned
from lagless.lab.learn._learner import RIDGES, TARGETS_PER_WEIGHT, Learner, Progress
from lagless.lab.learn._losses import ItemLoss, cross_entropy
from lagless.lab.learn._modes import Mode
from lagless.lab.learn._source import model_and_tensors, source_of
from lagless.lab.learn._training_data import refuse_trained_on
from lagless.rules import Rule


def learn(
    run: StrPath | Sequence[StrPath] | Trajectory | Models,
    documents: Iterable[Document] | Parts,
    *,
    loss: ItemLoss = cross_entropy,
    prior: Rule | None = None,
    modes: Sequence[Mode] | None = None,
    ridges: Sequence[float] = RIDGES,
    evaluations: int = 12,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
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
        run: a run folder, a list of checkpoints, or what :func:`lagless.checkpoints.find_checkpoints` found. Or models
            of several runs, as :func:`lagless.checkpoints.find_models` found them; their prior is the plain mean.
        documents: held-out documents, to be split; or parts that are split already.
        loss: of the model on items of documents; see :data:`ItemLoss`.
        prior: the rule whose weights the ridge pulls towards, and where the search starts; by default
            ``EMA(half_life_fraction=0.05)``.
        modes: which weights are allowed; see :data:`MODES`. By default all, but "decay" for models of several runs.
        ridges: λ, in nats per target.
        evaluations: at most.
        seed: of the split.
        groups: regular expressions on names of tensors, by the name of a group that has weights of its own; a tensor is
            in the first group whose expression is found in its name, else in one more, ``"rest"``.
        batch_size: items at a time.
        targets_per_weight: least targets of the fit part per weight.
        model: what sums are loaded into; by default the last checkpoint, as ``transformers`` loads it, or PEFT where
            checkpoints are adapters, whose A and B are then summed.
        device: where to evaluate; by default an accelerator if there is one.
        memory: bytes for buffers.
        state: the file of what was measured so far; if it exists, the search goes on from it.
        progress: called with what is being done, and the best loss on the choose part so far.

    Raises:
        CheckpointError: if checkpoints are missing, damaged, copies of each other, or do not fit the model.
        ValueError: if an argument is out of range, there is too little data, some of it is what the run was trained
            on, the loss is not finite at a checkpoint, memory runs out, or ``state`` is of another search.
    """
    source = source_of(run, prior)
    parts = documents if isinstance(documents, Parts) else split_documents(documents, seed)
    together = [*parts.fit.documents, *parts.choose.documents, *parts.report.documents]
    for place in source.runs:
        refuse_trained_on(place, together)
    chosen = source.modes if modes is None else tuple(modes)
    if source.steps is None and "decay" in chosen:
        raise ValueError("modes: 'decay' leaves nothing on θ_0, and models of several runs have none; leave it out.")
    held, tensors = model_and_tensors(source, model, device)
    learner = Learner(
        source.checkpoints,
        source.names,
        parts,
        loss,
        held,
        batch_size=batch_size,
        memory=memory,
        state=state,
        identity=source.identity,
        progress=progress,
        groups=groups,
        tensors=tensors,
    )
    return learner.run(
        source.prior,
        source.rules,
        modes=chosen,
        ridges=ridges,
        evaluations=evaluations,
        targets_per_weight=targets_per_weight,
        steps=source.steps,
        decays=source.decays,
    )
