"""Weighted sums of stored checkpoints in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lagless.checkpoints import Checkpoint, check_alike, open_checkpoint
from lagless.posthoc._weighted_sums import Accumulate, Progress, check_weights, stream_product


def combine_checkpoints(
    checkpoints: Sequence[str | os.PathLike[str] | Checkpoint],
    weights: ArrayLike,
    *,
    accumulate: Accumulate = "float32",
    memory: int = 2**30,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Tensor]]:
    """G weighted sums of N checkpoints, as tensors in memory: ``result[g] = Σ_i weights[g, i] checkpoints[i]``.

    To evaluate many sums without holding them all, give :func:`lagless.posthoc.stream_product` a consumer of your own.

    Args:
        checkpoints: N paths or open checkpoints with the same tensors.
        weights: shape (G, N), or (N,) for one sum.
        accumulate: type of the sums and of the result's floating-point tensors (float64 ones stay float64).
        memory: bytes for buffers, the results not counted.
        allow_nonfinite: let NaN and infinity through.
        progress: called with the bytes read so far and in all.

    Returns:
        One state dict per row of ``weights``.

    Raises:
        CheckpointError: if a checkpoint cannot be read, or they differ in a tensor.
        ValueError: if ``weights`` does not fit.
    """
    opened = [item if isinstance(item, Checkpoint) else open_checkpoint(item) for item in checkpoints]
    matrix = check_weights(weights, len(opened))
    check_alike(opened)
    sums = [_empty(opened[-1], accumulate) for _ in matrix]

    def keep(name: str, start: int, block: Tensor) -> None:
        for state, row in zip(sums, block, strict=True):
            state[name].view(-1)[start : start + row.numel()].copy_(row)

    stream_product(
        opened, matrix, keep, accumulate=accumulate, memory=memory, allow_nonfinite=allow_nonfinite, progress=progress
    )
    return sums


def _empty(like: Checkpoint, accumulate: Accumulate) -> dict[str, Tensor]:
    wide = getattr(torch, accumulate)
    types = {
        name: torch.promote_types(info.dtype, wide) if info.dtype.is_floating_point else info.dtype
        for name, info in like.tensors.items()
    }
    return {name: torch.empty(like.tensors[name].shape, dtype=dtype, device="cpu") for name, dtype in types.items()}
