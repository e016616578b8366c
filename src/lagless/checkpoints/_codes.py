"""Weights that are integer codes of numbers: an average of them, or of their scales alone, means nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._safetensors_format import TensorInfo

_CODES = re.compile(r"(.*[._])?(q?weights?|q_?weight|weight_packed|packed_weight|codes|blocks|q_?zeros|qzeros|g_idx)")
_SCALES = re.compile(
    r"(^|[._])(scales?|absmax|scb|quant_map|zeros?|zero_points?|codebooks?)([._]|$)|_scale(_inv)?$", re.I
)


def refuse_codes(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a checkpoint whose weights are integers, with scales beside them or without.

    Raises:
        CheckpointError: naming the first tensor of integer codes.
    """
    scaled = {_module(name) for name, info in tensors.items() if _SCALES.search(name) and info.dtype.is_floating_point}
    for name, info in tensors.items():
        integer = not info.dtype.is_floating_point and str(info.dtype) != "torch.bool"
        if integer and len(info.shape) > 1 and (_CODES.fullmatch(name) or _module(name) in scaled):
            _refuse(f"{path}: tensor {name!r} ({info}) holds integer codes of weights")


def _module(name: str) -> str:
    """The module a tensor belongs to; quantizers put their scales beside the codes or one level below them."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("weight")] if "weight" in parts[:-1] else parts[:-1])


def _refuse(what: str) -> NoReturn:
    raise CheckpointError(
        f"{what}; an average of codes, or of their scales alone, means nothing. Dequantize the checkpoints to bfloat16 "
        "or float32 first."
    )
