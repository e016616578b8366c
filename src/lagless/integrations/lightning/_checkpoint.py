"""The averages inside a Lightning checkpoint."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lagless.averaging import Averager
from lagless.rules import rule_from_dict

STATE_KEY = "lagless.AveragingCallback"


def load_average(
    path: str | PathLike[str], name: str | None = None, *, start: str | PathLike[str] | None = None
) -> dict[str, Tensor]:
    """The averaged model in a checkpoint that was written while :class:`AveragingCallback` followed the run.

    So that ``ModelCheckpoint(monitor="bema_val_loss")`` leads to a model:
    ``module.load_state_dict(load_average(checkpoint_callback.best_model_path, "bema"))``.

    Args:
        path: of the checkpoint.
        name: which average; may be left out if there is only one.
        start: the base checkpoint, if the callback was given one.

    Returns:
        The module's whole state dict, with averages in the live weights' dtype.

    Raises:
        ValueError: if the checkpoint holds no averages, or none of that name.
        RuntimeError: if the average has had no update by then.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    stored = checkpoint.get("callbacks", {}).get(STATE_KEY)
    if stored is None:
        raise ValueError(
            f"{Path(path)} holds no averages; give a checkpoint (not a weights-only one) that was written during a fit "
            "with AveragingCallback."
        )
    live: dict[str, Tensor] = checkpoint["state_dict"]
    state, keys = stored["averages"], {_plain(key): key for key in live}
    averaged = {tensor.partition("/")[2] for tensor in state["tensors"]}
    memory = {live[keys[parameter]].data_ptr() for parameter in averaged}
    named = {parameter: live[key] for parameter, key in keys.items() if live[key].data_ptr() in memory}
    rules = {rule: rule_from_dict(settings) for rule, settings in state["meta"]["rules"].items()}
    averager = Averager(named, rules, dtype=stored["dtype"], start=start)
    averager.load_state_dict(state)
    average = averager.read(name)
    return live | {keys[parameter]: value.to(named[parameter].dtype) for parameter, value in average.items()}


def _plain(key: str) -> str:
    """The key without the levels that ``torch.compile`` adds, as the Averager names parameters."""
    return ".".join(part for part in key.split(".") if part != "_orig_mod")
