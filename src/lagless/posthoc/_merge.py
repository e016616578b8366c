"""Merges of models of several runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lagless.checkpoints import (
    CARD,
    RECORD,
    Models,
    ModelWriter,
    StrPath,
    absolute_path,
    check_destination,
    find_models,
    model_card,
    permissions_of,
    plan_layout,
    reporting,
)
from lagless.execution import Ranks
from lagless.posthoc._groups import TensorGroups
from lagless.posthoc._weighted_sums import Accumulate, Progress, stream_product
from lagless.rules import FloatArray


def merge_models(
    models: Sequence[StrPath] | Models,
    weights: ArrayLike,
    out: StrPath,
    *,
    groups: Mapping[str, str] | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    memory: int = 2**30,
    accumulate: Accumulate = "float32",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    dry_run: bool = False,
    group: Any = None,
    remarks: Mapping[str, Any] | None = None,
) -> Path:
    """Write Σ_i w_i θ_i of models of several runs as a model that ``from_pretrained`` loads, reading every byte once.

    This is the linear merge, or model soup, with one weight for each model, or one for each model and group of tensors.
    Tokenizer and configuration are the last model's, as are integers and running statistics. ``lagless.json`` says
    which models were merged, by name and fingerprint.

    Args:
        models: as for :func:`lagless.checkpoints.find_models`, or what it found.
        weights: one for each model, of any sign, summing to 1, shape (N,); with ``groups`` shape (G, N).
        groups: regular expressions on names of tensors, by the name of a group. A tensor is in the first that is found
            in its name, else in one more group, ``"rest"``, which is the last row if it has any.
        out: the output folder; it appears when everything is written.
        dtype: as for :func:`average_checkpoints`, and so the other options.

    Returns:
        The output folder.

    Raises:
        CheckpointError: if models are missing, damaged or do not fit each other, or the output cannot be written.
        ValueError: if an argument is out of range.

    Reference:
        M. Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time, ICML 2022.
    """
    out = absolute_path(out)
    found = models if isinstance(models, Models) else find_models(models)
    last = found.checkpoints[-1]
    parts = TensorGroups(groups or {}, last.tensors)
    given = _checked(weights, found.names, parts.names)
    layout = plan_layout(last.written, dtype, max_shard_size, last.is_adapter, last.stem)
    with reporting(out):
        check_destination(out, [checkpoint.path for checkpoint in found.checkpoints], overwrite)
    if dry_run:
        return out
    source, ranks = last.companions, Ranks(group)
    permissions, quantized = permissions_of(found.checkpoints), last.quantized is not None
    with ModelWriter(out, [""], layout, source, dtype, ranks, overwrite, permissions, quantized) as writer:
        prints = stream_product(
            found.checkpoints,
            given,
            parts.consumer(writer),
            accumulate=accumulate,
            memory=memory,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            ranks=ranks,
            names=layout.share(ranks.rank, ranks.size),
        )
        record = {**_record(found, given, parts, prints, accumulate, dtype), **(remarks or {})}
        writer.write_texts(RECORD, [json.dumps(record, indent=2, ensure_ascii=False) + "\n"])
        folder = source if source.is_dir() else source.parent
        writer.write_texts(CARD, [model_card(record, folder)])
    return out


def _checked(weights: ArrayLike, models: Sequence[str], groups: Sequence[str]) -> FloatArray:
    """Return weights as an array of shape (G, N).

    Raises:
        ValueError: if there are more or fewer, one is not finite, or those of a group do not sum to 1.
    """
    given = np.asarray(weights, dtype=np.float64)
    shape = (len(groups), len(models)) if len(groups) > 1 else (len(models),)
    if given.shape not in {shape, (len(groups), len(models))}:
        by_group = f", for each of the groups {', '.join(groups)}" if len(groups) > 1 else ""
        raise ValueError(
            f"weights have shape {given.shape}; it must be {shape}: one for each of the models {', '.join(models)}"
            f"{by_group}."
        )
    given = np.atleast_2d(given)
    for group, row in zip(groups, given, strict=True):
        if not (np.isfinite(row).all() and abs(row.sum() - 1.0) <= 1e-6):
            where = f" of group {group!r}" if len(groups) > 1 else ""
            raise ValueError(f"weights{where} are {row.tolist()}; they must be finite and sum to 1.")
    return given


def _record(
    models: Models,
    weights: FloatArray,
    groups: TensorGroups,
    fingerprints: Sequence[str | None],
    accumulate: str,
    dtype: str,
) -> dict[str, Any]:
    from lagless._version import __version__

    columns: list[list[float]] = np.transpose(weights).tolist()
    each: list[dict[str, Any]] = [
        {"weight": column[0]} if len(groups.names) == 1 else {"weights": dict(zip(groups.names, column, strict=True))}
        for column in columns
    ]
    return {
        "lagless": __version__,
        "name": "",
        "rule": None,
        "weights": (weights if len(groups.names) > 1 else weights[0]).tolist(),
        "sources": [
            {"name": name, **own, "files": [file.name for file in checkpoint.files], "fingerprint": digest}
            for name, checkpoint, own, digest in zip(models.names, models.checkpoints, each, fingerprints, strict=True)
        ],
        **({"groups": groups.patterns} if groups.patterns else {}),
        "accumulate": accumulate,
        "dtype": dtype,
    }
