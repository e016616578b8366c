"""What a stored checkpoint says of the training it is from: its step, and metrics by which it may be chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from lagless._validation import is_list, is_mapping, is_object
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._json import read_object
from lagless.checkpoints._torch_archive import ArchivedTensor, TorchArchive

STATE = "trainer_state.json"
Mode = Literal["min", "max"]

_SMALLER = ("loss", "perplexity", "ppl", "error", "wer", "cer", "nll", "bpb", "mse", "mae", "rmse")
_LARGER = (
    "accuracy",
    "acc",
    "f1",
    "bleu",
    "rouge",
    "reward",
    "rewards",
    "auc",
    "map",
    "iou",
    "recall",
    "precision",
    "top1",
)


def stored_step(path: Path) -> int:
    """Return the step that a checkpoint of Lightning says it is of.

    Raises:
        CheckpointError: if it says none.
    """
    step = _torch_content(path).get("global_step")
    if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
        return step
    raise CheckpointError(
        f"{path}: neither its name nor global_step in it says which step it is of. Give the checkpoints as a list, "
        "with their steps (--steps)."
    )


def best_checkpoints(
    named: list[tuple[int, Path]], count: int, metric: str, mode: Mode | None = None
) -> list[tuple[int, Path]]:
    """Return those ``count`` checkpoints whose metric is best, in order of their steps.

    Args:
        named: step and path of each checkpoint.
        count: how many.
        metric: a metric in ``trainer_state.json`` (transformers), one that a ``ModelCheckpoint`` of Lightning monitors,
            or ``metric`` of timm.
        mode: whether small or large values are good; None to go by the metric's name.

    Raises:
        CheckpointError: if a checkpoint does not say its metric.
        ValueError: if there are fewer checkpoints, or the name leaves open which values are good.
    """
    if not 2 <= count <= len(named):
        raise ValueError(
            f"best={count}: it must be at least 2 and at most {len(named)}, the checkpoints that there are."
        )
    mode = mode or _mode_of(metric)
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r}; it must be 'min' or 'max'.")
    scores = metric_values(named, metric)
    missing = [path for step, path in named if step not in scores]
    if missing:
        known = sorted({name for _, path in named for name in _names(path)})
        raise CheckpointError(
            f"{missing[0]}: says no value of {metric!r}; looked in {STATE}, and in files of Lightning and timm. "
            f"Metrics found: {', '.join(known) or 'none'}. Choose one of them, or give the "
            "checkpoints that are meant with steps (--steps)."
        )
    sign = 1.0 if mode == "min" else -1.0
    chosen = sorted(named, key=lambda item: (sign * scores[item[0]], item[0]))[:count]
    return sorted(chosen)


def metric_values(named: list[tuple[int, Path]], metric: str) -> dict[int, float]:
    """Return the value of a metric at each step that has one which is finite."""
    wanted = {step for step, _ in named}
    found: dict[int, float] = {}
    for step, path in named:  # later logs repeat earlier entries
        found |= {at: value for at, name, value in _logged(path) if name == metric and at in wanted}
        own = _stored(path) if not path.is_dir() else {}
        if metric in own:
            found[step] = own[metric]
    return {step: value for step, value in found.items() if math.isfinite(value)}


def _mode_of(metric: str) -> Mode:
    words = metric.lower().replace("/", "_").replace("-", "_").split("_")
    small, large = any(word in _SMALLER for word in words), any(word in _LARGER for word in words)
    if small == large:
        raise ValueError(
            f"metric={metric!r}: its name does not say whether small or large values are good. Say so with mode='min' "
            "or 'max' (--mode)."
        )
    return "min" if small else "max"


def _names(path: Path) -> set[str]:
    return {name for _, name, _ in _logged(path)} | (set() if path.is_dir() else set(_stored(path)))


def _logged(path: Path) -> Iterator[tuple[int, str, float]]:
    """Step, name and value of what a Trainer logged, if there is a readable log."""
    try:
        history: Any = read_object((path if path.is_dir() else path.parent) / STATE, "").get("log_history")
    except CheckpointError:
        return
    for entry in history if is_list(history) else ():
        if is_object(entry) and isinstance(entry.get("step"), int):
            for name, value in entry.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)) and not isinstance(value, bool):
                    yield entry["step"], name, float(value)


def _stored(path: Path) -> dict[str, float]:
    """What a file of Lightning or timm says of its own metric."""
    try:
        content = _torch_content(path)
    except CheckpointError:
        return {}
    found: dict[str, float] = {}
    callbacks = content.get("callbacks")
    for state in callbacks.values() if is_mapping(callbacks) else ():
        if is_mapping(state) and isinstance(monitor := state.get("monitor"), str):
            if (score := _number(path, state.get("current_score"))) is not None:
                found[monitor] = score
    if (own := _number(path, content.get("metric"))) is not None:
        found["metric"] = own
    return found


def _torch_content(path: Path) -> Mapping[Any, Any]:
    file = path / "meta.pt" if path.is_dir() else path  # Lightning's sharded checkpoints
    try:
        with file.open("rb") as opened:
            content = TorchArchive(opened).content
    except Exception as error:  # damaged files raise many kinds
        raise CheckpointError(f"{file}: cannot be read as a torch file ({error}).") from error
    return content if is_mapping(content) else {}


def _number(path: Path, value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, ArchivedTensor) and value.shape in ((), (1,)) and value.dtype.is_floating_point:
        with path.open("rb") as file:
            begin = TorchArchive(file).begin(value)
            file.seek(begin)
            return float(torch.frombuffer(bytearray(file.read(value.dtype.itemsize)), dtype=value.dtype)[0])
    return None
