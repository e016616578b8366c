"""The averages inside a Lightning checkpoint."""

from __future__ import annotations

import pickle
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lagless.averaging import Averager, plain_name
from lagless.rules import rule_from_dict

STATE_KEY = "lagless.AveragingCallback"


def load_average(
    path: str | PathLike[str], name: str | None = None, *, start: str | PathLike[str] | None = None
) -> dict[str, Tensor]:
    """The averaged model in a checkpoint that was written while :class:`AveragingCallback` followed the run.

    So that ``ModelCheckpoint(monitor="bema_val_loss")`` leads to a model:
    ``module.load_state_dict(load_average(checkpoint_callback.best_model_path, "bema"))``.

    The file is unpickled without running anything that it names. Where ``save_hyperparameters`` put objects of other
    classes into it, such as a dataclass of settings, allow those first: ``torch.serialization.add_safe_globals``.

    Args:
        path: of the checkpoint.
        name: which average; may be left out if there is only one.
        start: the base checkpoint, if the callback was given one.

    Returns:
        The module's whole state dict, with averages in the live weights' dtype.

    Raises:
        ValueError: if the checkpoint holds no averages, or none of that name, or objects of classes not allowed.
        RuntimeError: if the average has had no update by then.
    """
    path = Path(path).expanduser()
    checkpoint = _load(path)
    stored = checkpoint.get("callbacks", {}).get(STATE_KEY)
    if stored is None:
        raise ValueError(
            f"{path} holds no averages; give a checkpoint (not a weights-only one) that was written during a fit "
            "with AveragingCallback."
        )
    live: dict[str, Tensor] = checkpoint["state_dict"]
    state, keys = stored["averages"], {plain_name(key): key for key in live}
    averaged = {tensor.partition("/")[2] for tensor in state["tensors"]}
    memory = {live[keys[parameter]].data_ptr() for parameter in averaged}
    named = {parameter: live[key] for parameter, key in keys.items() if live[key].data_ptr() in memory}
    rules = {rule: rule_from_dict(settings) for rule, settings in state["meta"]["rules"].items()}
    averager = Averager(named, rules, dtype=stored["dtype"], start=start)
    averager.load_state_dict(state)
    average = averager.read(name)
    return live | {keys[parameter]: value.to(named[parameter].dtype) for parameter, value in average.items()}


def _load(path: str | PathLike[str]) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        short = ", ".join(name.rpartition(".")[2] for name in classes)
        raise ValueError(
            f"{Path(path)} holds objects of {', '.join(classes)}, perhaps from save_hyperparameters, which are not "
            f"unpickled unless allowed. If you trust them: torch.serialization.add_safe_globals([{short}]), then load "
            "again."
        ) from error
