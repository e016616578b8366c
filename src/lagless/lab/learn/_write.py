"""The model that learned weights make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lagless.checkpoints import Models, StrPath, Trajectory
from lagless.lab.learn._learned import Learned
from lagless.posthoc import TensorGroups, average_checkpoints, merge_models


def write_learned(
    source: Trajectory | Models,
    found: Learned | None,
    out: StrPath,
    *,
    groups: Mapping[str, str] | None = None,
    remarks: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Write the sum of checkpoints under learned weights as a model; ``lagless.json`` says how they were found.

    Args:
        source: what they were learned on.
        found: what was learned; None to check ``out`` and write nothing.
        out: the output folder.
        groups: the groups that the weights were learned in.
        remarks: what ``lagless.json`` is to say besides.
        options: of :func:`lagless.posthoc.merge_models`, such as ``dtype`` and ``overwrite``.

    Raises:
        CheckpointError: if ``out`` cannot be written.
    """
    options |= {"dry_run": found is None, "remarks": {**({} if found is None else found.record()), **(remarks or {})}}
    if isinstance(source, Trajectory) and not groups:
        average_checkpoints(source, None if found is None else found.weights, out, **options)
        return
    names = TensorGroups(groups or {}, source.checkpoints[-1].tensors).names
    if isinstance(source, Trajectory):
        options["remarks"] |= {"steps": list(source.steps)}
        source = Models(source.checkpoints, tuple(checkpoint.path.name for checkpoint in source.checkpoints))
    rows = [[1.0 / len(source.names)] * len(source.names)] * len(names)
    weights = rows if found is None else list(found.by_group.values())
    merge_models(source, weights, out, groups=groups, **options)
