"""Folders of averages: each says what it is, and replaces only what says so too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lagless.averaging import Averager, HoldsAverages
from lagless.checkpoints import RECORD, atomic_folder, remove_own_files
from lagless.optim import AveragedOptimizer
from lagless.rules import rule_to_dict


def record_text(holder: HoldsAverages, name: str, dtype: str = "auto") -> str:
    """Return the text of ``lagless.json`` beside the average ``name``: the rule, the step, the number of updates."""
    return as_text({**describe(holder, name), "dtype": dtype})


def describe(holder: HoldsAverages, name: str) -> dict[str, Any]:
    """Return what is known of the average ``name``; an optimizer with several rules has a list of them."""
    known: dict[str, Any] = {"name": name, "weights": "average"}
    if isinstance(holder, Averager):
        known |= {"rule": rule_to_dict(holder.rules[name]), "step": holder.step}
    elif isinstance(holder, AveragedOptimizer):
        rules = [rule_to_dict(group["average"]) for group in holder.param_groups]
        distinct = [rule for i, rule in enumerate(rules) if rule not in rules[:i]]
        known |= {"optimizer": type(holder).__name__, "rule": distinct[0] if len(distinct) == 1 else distinct}
        known |= {"step": holder.steps_taken}
    return {**known, "updates": holder.updates(name)}


def as_text(record: dict[str, Any]) -> str:
    """Return a record as the text of a file, with the version of lagless in front."""
    from lagless._version import __version__

    return json.dumps({"lagless": __version__, **record}, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def export_folder(out: Path, record: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder that becomes ``out``, record included, when the ``with`` block ends well.

    Raises:
        CheckpointError: if ``out`` holds what lagless did not write.
    """
    with atomic_folder(out) as temporary:
        yield temporary
        (temporary / RECORD).write_text(as_text({**record, "dtype": "auto"}), encoding="utf-8")


def remove_export(out: Path) -> None:
    """Remove the files of an earlier export, and the folder if nothing else is in it."""
    if (out / RECORD).is_file():
        remove_own_files(out)
