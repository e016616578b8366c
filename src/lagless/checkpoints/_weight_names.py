"""Telling weights from the other states of a training run by where they were saved."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

STATE_KEYS = ("state_dict", "model", "model_state_dict", "module")
"""Where a state dict of weights lies in what was saved."""

AVERAGE_KEYS = ("state_dict_ema",)
"""Where timm keeps an average beside the live weights in one file; other names may be either."""

NOT_WEIGHTS = re.compile(
    r"optimizer|(^|[._/-])optim(s|_states?)?([._/-]|$)|scheduler|scaler|rng_state|random_states|training_args|"
    r"trainer_state|^callbacks$",
    re.IGNORECASE,
)
"""Found in the names of files and of entries that hold other states."""

# First parts of flat names, as in optimizer.state.exp_avg.layers.0.weight. A module may be called scaler or
# scheduler, so those words alone decide nothing.
_OTHER_STATES = re.compile(
    r"(\w+_)?optim(izer)?s?(_states?)?(_dict)?|(\w+_)?rng_states?|opt_param_scheduler|rerun_state_machine_state|"
    r"param_groups",
    re.IGNORECASE,
)
_CHAINED = re.compile(r"chained_\d+")  # optimizers of Megatron in a row
_OF_OPTIMIZERS = {
    *("exp_avg", "exp_avg_sq", "exp_avg_slow", "exp_avg_diff", "exp_avg_sq_row", "exp_avg_sq_col", "exp_inf"),
    *("max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "prev_param"),
    *("fp32_param", "fp32_params", "master_param", "master_params", "master_weight", "master_weights"),
}
_STATISTIC = re.compile(r"running_\w+|moving_(mean|var|variance)|num_batches_tracked")


def is_other_state(name: str) -> bool:
    """Whether a flat name is that of an optimizer's or a random state, and not that of a weight.

    >>> is_other_state("optimizer.state.exp_avg.layers.0.weight"), is_other_state("layers.0.weight")
    (True, False)
    """
    parts = re.split(r"[./]", name)
    first = next((part for part in parts if not _CHAINED.fullmatch(part)), "")
    return len(parts) > 1 and (_OTHER_STATES.fullmatch(first) is not None or not _OF_OPTIMIZERS.isdisjoint(parts))


def is_running_statistic(name: str) -> bool:
    """Whether a name is that of a statistic of activations that a normalisation layer keeps, like batch norm.

    Such buffers belong to the weights they were gathered under. A rule with negative weights, like BEMA, would make
    negative variances of them.

    >>> is_running_statistic("bn1.running_var"), is_running_statistic("bn1.weight")
    (True, False)
    """
    return _STATISTIC.fullmatch(name.rpartition(".")[2]) is not None


def is_averaged(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor is averaged; integers, booleans and running statistics are the last checkpoint's."""
    return dtype.is_floating_point and not is_running_statistic(name)


def depth_of_state(path: Sequence[object]) -> int:
    """How many levels of ``path`` lead to the state dict it lies in: up to the last key of ``STATE_KEYS``; else 0."""
    return max((i for i, level in enumerate(path[:-1], 1) if level in STATE_KEYS), default=0)
