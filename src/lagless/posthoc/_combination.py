"""A model folder from any weights on stored checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from lagless.checkpoints import (
    RECORD,
    Checkpoint,
    ModelWriter,
    StrPath,
    absolute_path,
    check_alike,
    check_destination,
    permissions_of,
    plan_layout,
    reporting,
    sidecar_files,
)
from lagless.execution import Ranks
from lagless.posthoc._weighted_sums import Accumulate, Progress, check_weights, stream_product


def write_combination(
    checkpoints: Sequence[Checkpoint],
    weights: ArrayLike,
    out: StrPath,
    record: Mapping[str, Any],
    *,
    labels: Sequence[Mapping[str, Any]] | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    memory: int = 2**30,
    accumulate: Accumulate = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
    dry_run: bool = False,
    group: Any = None,
) -> Path:
    """Write Σ_i w_i θ_i as a model folder that ``from_pretrained`` loads, in one pass over the files.

    Args:
        checkpoints: N checkpoints with the same tensors.
        weights: shape (N,).
        out: the output folder; it appears when everything is written.
        record: what ``lagless.json`` says beside the sources, their weights and fingerprints.
        labels: what it says of each source, such as its step.
        dtype: as for :func:`lagless.posthoc.average_checkpoints`, and so all that follow.
        max_shard_size: largest weight file.
        memory: bytes for buffers.
        accumulate: type to sum in.
        overwrite: replace ``out`` if it holds earlier averages.
        progress: called with the bytes read so far and in all.
        dry_run: check everything that can be checked without reading weights, write nothing.
        group: processes of ``torch.distributed`` that divide the weight files among them.

    Returns:
        The folder.

    Raises:
        CheckpointError: if checkpoints are damaged or differ in a tensor, or the output cannot be written.
        ValueError: if an argument is out of range.
    """
    from lagless._version import __version__

    out = absolute_path(out)
    (row,) = check_weights(weights, len(checkpoints))
    check_alike(checkpoints)
    last = checkpoints[-1]
    layout = plan_layout(last.tensors, dtype, max_shard_size, last.is_adapter)
    with reporting(out):
        check_destination(out, [checkpoint.path for checkpoint in checkpoints], overwrite)
    if dry_run:
        return out
    source = next((c.path for c in reversed(checkpoints) if sidecar_files(c.path)), last.path)
    ranks = Ranks(group)
    with ModelWriter(out, [""], layout, source, dtype, ranks, overwrite, permissions_of(checkpoints)) as writer:
        fingerprints = stream_product(
            checkpoints,
            row,
            writer,
            accumulate=accumulate,
            memory=memory,
            progress=progress,
            ranks=ranks,
            names=layout.share(ranks.rank, ranks.size),
        )
        sources = [
            {
                "name": checkpoint.path.absolute().name,
                **label,
                "weight": float(weight),
                "files": [file.name for file in checkpoint.files],
                "fingerprint": fingerprint,
            }
            for checkpoint, label, weight, fingerprint in zip(
                checkpoints, labels or [{}] * len(checkpoints), row, fingerprints, strict=True
            )
        ]
        whole = {"lagless": __version__, **record, "sources": sources, "accumulate": accumulate, "dtype": dtype}
        writer.write_texts(RECORD, [json.dumps(whole, indent=2, ensure_ascii=False) + "\n"])
    return out
