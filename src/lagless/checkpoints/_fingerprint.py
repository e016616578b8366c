"""A digest of a checkpoint's weights that does not depend on how they are cut into files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import numpy as np
import xxhash

from lagless.checkpoints._checkpoint import Checkpoint
from lagless.checkpoints._open import open_checkpoint
from lagless.checkpoints._safetensors_format import NAMES, TensorInfo

_CHUNK = 1 << 22


def combine_digests(tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    """The fingerprint of tensors whose bytes have the given xxh3-128 digests (hexadecimal)."""
    lines = [[name, NAMES[info.dtype], list(info.shape), digests[name]] for name, info in sorted(tensors.items())]
    return "xxh3-128:" + xxhash.xxh3_128(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()


def fingerprint(checkpoint: str | os.PathLike[str] | Checkpoint) -> str:
    """The fingerprint of a stored checkpoint: a digest of the names, types, shapes and bytes of its tensors.

    It guards against mixing up files, not against somebody who forges one.

    Args:
        checkpoint: a path that :func:`open_checkpoint` accepts, or an open checkpoint.

    Raises:
        CheckpointError: if the checkpoint cannot be read.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    buffer = np.empty(_CHUNK, dtype=np.uint8)
    digests: dict[str, str] = {}
    for name, info in opened.tensors.items():
        digest = xxhash.xxh3_128()
        with opened.reader(name) as reader:
            for start in range(0, info.nbytes, _CHUNK):
                part = buffer[: min(_CHUNK, info.nbytes - start)]
                reader.read(start, part)
                digest.update(part.data)
        digests[name] = digest.hexdigest()
    return combine_digests(opened.tensors, digests)
