"""What learning found, and as what it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lagless.lab.learn._documents import Parts
from lagless.lab.learn._modes import Floats
from lagless.lab.learn._search import Evaluation, Setting
from lagless.lab.statistics import Mean


@dataclass(frozen=True)
class Comparison:
    """The learned weights against something else, on documents that nothing was chosen on.

    Attributes:
        role: ``"live"`` (the last checkpoint), ``"best checkpoint"``, ``"best rule"``, ``"best decay"`` (of the fixed
            shapes) or ``"prior"``.
        name: which checkpoint or rule that is.
        weights: its weights on the checkpoints.
        loss: its loss.
        difference: of the learned weights' loss minus its, paired by document.
    """

    role: str
    name: str
    weights: Floats
    loss: Mean
    difference: Mean


@dataclass(frozen=True)
class Learned:
    """Weights learned from held-out loss.

    Attributes:
        names: of the checkpoints.
        steps: of the checkpoints; None where they are not of one run.
        weights: shape (N,); they sum to 1. With groups those of one group after another, shape (GN,).
        setting: which mode and ridge was chosen; None if the prior was best.
        prior: the weights that the ridge pulled towards, shape (N,).
        degrees_of_freedom: the effective number of weights fitted.
        on_edge: whether the trust region kept the weights from where the model's minimum is.
        evaluations: all that were made, in order.
        loss: on the report part.
        comparisons: with live, the best checkpoint, the best rule, the best decay and the prior, on the report part;
            for models of several runs with the best of them and the prior.
        decays: with averages that equal decays of the learned shape over the last part of the run, on the report part.
        parts: the documents.
        fingerprints: of the checkpoints.
        groups: regular expressions on names of tensors, by the name of a group.
        group_names: of the groups that have weights of their own, ``"rest"`` for tensors in none of ``groups``.
        reads: bytes read, in units of all checkpoints' bytes, by the evaluations, and by all else.
    """

    names: tuple[str, ...]
    steps: tuple[int, ...] | None
    weights: Floats
    setting: Setting | None
    prior: Floats
    degrees_of_freedom: float
    on_edge: bool
    evaluations: tuple[Evaluation, ...]
    loss: Mean
    comparisons: tuple[Comparison, ...]
    decays: tuple[Comparison, ...]
    parts: Parts
    fingerprints: tuple[str, ...]
    groups: Mapping[str, str]
    group_names: tuple[str, ...]
    reads: tuple[float, float]

    @property
    def by_group(self) -> dict[str, Floats]:
        """The weights on the checkpoints, shape (N,), by the name of the group."""
        return dict(zip(self.group_names, self.weights.reshape(len(self.group_names), -1), strict=True))

    def record(self) -> dict[str, Any]:
        """Return what ``lagless.json`` says of how the weights were found."""
        return {
            "learned": {
                "mode": self.setting and self.setting.mode,
                "ridge": self.setting and self.setting.ridge,
                "degrees_of_freedom": self.degrees_of_freedom,
                "on_edge_of_trust_region": self.on_edge,
                "loss": asdict(self.loss),
                "differences": {
                    c.role: {"name": c.name, "loss": asdict(c.loss), "learned_minus_it": asdict(c.difference)}
                    for c in self.comparisons
                },
                "decays_of_the_shape": {
                    c.name: {"loss": asdict(c.loss), "learned_minus_it": asdict(c.difference)} for c in self.decays
                },
                "evaluations": [
                    {"setting": e.setting and asdict(e.setting), "fit": e.fit, "choose": e.choose}
                    for e in self.evaluations
                ],
                "prior": self.prior.tolist(),
                "data": _data(self.parts),
                "fingerprints": dict(zip(self.names, self.fingerprints, strict=True)),
            }
        }


def _data(parts: Parts) -> Mapping[str, Any]:
    return {
        part.name: {"documents": len(part.documents), "targets": part.size, "sha256": part.digest}
        for part in (parts.fit, parts.choose, parts.report)
    }
