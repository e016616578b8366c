"""Checks that checkpoints have the same tensors."""

from __future__ import annotations

from collections.abc import Sequence

from lagless.checkpoints._checkpoint import Checkpoint
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._safetensors_format import TensorInfo

_APART = "They do not belong together: leave one out, or convert it."
_RENAMED = (
    "If it is the model the run began with, another version of transformers named its tensors (fused experts, parts of "
    "vision models): load it with the version that trained, save it with save_pretrained, and give that folder."
)


def check_alike(checkpoints: Sequence[Checkpoint], start_given: bool = False) -> None:
    """Refuse checkpoints that differ in the name, type or shape of a tensor.

    Args:
        checkpoints: what to compare.
        start_given: let floating-point types of the first one differ.

    Raises:
        CheckpointError: naming the first difference and both checkpoints.
    """
    last = checkpoints[-1]
    for position, other in enumerate(checkpoints[:-1]):
        if other.is_adapter != last.is_adapter:
            kinds = ["a whole model", "an adapter"]
            raise CheckpointError(
                f"{other.path} is {kinds[other.is_adapter]}, {last.path} is {kinds[last.is_adapter]}. Average "
                "checkpoints of one kind; the θ_0 of an adapter is the adapter at its initialisation."
            )
        for name in sorted(other.tensors.keys() ^ last.tensors.keys()):
            has, lacks = (other, last) if name in other.tensors else (last, other)
            raise CheckpointError(
                f"{lacks.path} has no tensor {name!r}, {has.path} has it ({has.tensors[name]}). {_APART}"
            )
        for name, info in other.tensors.items():
            if not _alike(info, last.tensors[name], start_given and position == 0):
                raise CheckpointError(
                    f"tensor {name!r} is {info} in {other.path}, but {last.tensors[name]} in {last.path}. {_APART}"
                )


def _alike(one: TensorInfo, other: TensorInfo, any_float: bool) -> bool:
    both_float = one.dtype.is_floating_point and other.dtype.is_floating_point
    return one.shape == other.shape and (one.dtype == other.dtype or (any_float and both_float))


def fit_start(start: Checkpoint, last: Checkpoint) -> Checkpoint:
    """The tensors of ``start`` that the run has; a base model may hold more, like a head for several tokens.

    Raises:
        CheckpointError: naming a tensor that ``start`` lacks.
    """
    if start.is_adapter == last.is_adapter and (lacking := sorted(last.tensors.keys() - start.tensors.keys())):
        spare = sorted(start.tensors.keys() - last.tensors.keys())
        has = f"; of its own it has {spare[0]!r}{', ...' if spare[1:] else ''}" if spare else ""
        raise CheckpointError(
            f"start: {start.path} lacks {len(lacking)} of the {len(last.tensors)} tensors in {last.path}, the first is "
            f"{lacking[0]!r}{has}. {_RENAMED}"
        )
    return start.restricted_to(name for name in last.tensors if name in start.tensors)
