"""Folders of averages: each says what it is, and replaces only what says so too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lagless.averaging import Averager
from lagless.checkpoints import RECORD, Destination, check_destination
from lagless.rules import rule_to_dict


def record_text(averager: Averager, name: str, dtype: str = "auto") -> str:
    """What ``lagless.json`` says beside the average ``name``: the rule, the step, the number of updates."""
    from lagless._version import __version__

    record = {
        "lagless": __version__,
        "name": name,
        "rule": rule_to_dict(averager.rules[name]),
        "step": averager.step,
        "updates": averager.updates(name),
        "dtype": dtype,
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def export_folder(out: Path, averager: Averager, name: str) -> Iterator[Path]:
    """A temporary folder that becomes ``out``, record included, when the ``with`` block ends well.

    Raises:
        CheckpointError: if ``out`` holds what is no export.
    """
    check_destination(out, [], overwrite=True)
    with Destination(out) as temporary:
        yield temporary
        (temporary / RECORD).write_text(record_text(averager, name), encoding="utf-8")


def remove_export(out: Path) -> None:
    """Remove an earlier export; anything else stays."""
    if (out / RECORD).is_file():
        shutil.rmtree(out)
