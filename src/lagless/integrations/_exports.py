"""Folders of averages: each says what it is, and replaces only what says so too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lagless.averaging import Averager, HoldsAverages
from lagless.checkpoints import CARD, RECORD, atomic_folder, is_hub_name, model_card, remove_own_files
from lagless.integrations._facts import average_facts
from lagless.optim import AveragedOptimizer
from lagless.rules import rule_from_dict, rule_to_dict


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
    known |= {"updates": holder.updates(name)}
    if isinstance(rule := known.get("rule"), dict) and (facts := average_facts(rule_from_dict(rule), known["step"])):
        known |= {"mean_age": facts.mean_age, "effective_iterates": facts.effective_iterates}
        known |= {"schedule": {str(step): factor for step, factor in facts.schedule.items()}}
    return known


def as_text(record: dict[str, Any]) -> str:
    """Return a record as the text of a file, with the version of lagless in front."""
    return json.dumps(complete(record), indent=2, ensure_ascii=False) + "\n"


def complete(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the version of lagless in front."""
    from lagless._version import __version__

    return {"lagless": __version__, **record}


def base_model_name(model: Any) -> str | None:
    """Return the model on the hub that a model of transformers, diffusers or PEFT was loaded from; None for others."""
    config = getattr(model, "config", None)
    names = (getattr(model, "name_or_path", None), getattr(config, "_name_or_path", None))
    return next((name for name in names if isinstance(name, str) and is_hub_name(name)), None)


@contextmanager
def export_folder(out: Path, record: dict[str, Any], base_model: str | None = None) -> Iterator[Path]:
    """A temporary folder that becomes ``out``, record and card included, when the ``with`` block ends well.

    Args:
        out: the folder.
        record: what the average is.
        base_model: the model on the hub that training began with, if the files in the folder do not say it.

    Raises:
        CheckpointError: if ``out`` holds what lagless did not write.
    """
    with atomic_folder(out) as temporary:
        yield temporary
        record = complete({**record, "dtype": "auto"})
        (temporary / RECORD).write_text(as_text(record), encoding="utf-8")
        (temporary / CARD).write_text(model_card(record, temporary, base_model), encoding="utf-8")


def remove_export(out: Path) -> None:
    """Remove the files of an earlier export, and the folder if nothing else is in it."""
    if (out / RECORD).is_file():
        remove_own_files(out)
