"""A study: the claims it was made to test, stated before its runs, and the runs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lagless.checkpoints import atomic_file

Value = bool | int | float | str | None
Setting = dict[str, Value]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _flags_are_no_numbers(cls, data: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(data, dict) else ():
            value = data.get(name)
            values = value.values() if isinstance(value, dict) else (value,)
            if "bool" not in str(field.annotation) and any(isinstance(one, bool) for one in values):
                raise ValueError(f"{name}: true and false are no numbers")
        return data


class Run(_Record):
    """One run, or one average of a run, and how it scored."""

    method: str = Field(description="what is compared, e.g. 'bema'")
    setting: Setting = Field(description="its hyperparameters; one combination is one point of the tuning budget")
    seed: int = Field(description="of data order, initial weights and dropout; methods are paired by it")
    scores: dict[str, float] | None = Field(description="'split/metric' to value; null if the run diverged")
    tuning: bool = Field(
        default=False,
        description="made to choose a setting, on seeds that are not reported; a method with such runs chooses by them "
        "alone, among the settings that have all of its tuning seeds",
    )
    curves: dict[str, list[tuple[float, float]]] = Field(default={}, description="'split/metric' to (step, value)")


class Claim(_Record):
    """A comparison that was fixed before the runs: ``score(method) - score(baseline)`` has the claimed sign."""

    text: str = Field(description="what is claimed")
    source: str = Field(description="who claims it: paper, figure or table; or 'ours'")
    number: str | None = Field(default=None, description="the size of the effect as the source gives it")
    method: str
    baseline: str
    score: str = Field(description="what is compared, e.g. 'test/loss'")
    claimed: Literal[-1, 1] = Field(description="sign of method - baseline that is claimed; -1: smaller")
    selected_by: str | None = Field(
        default=None, description="score by which each side's setting is chosen (smallest mean over seeds); null: `at`"
    )
    maximize: bool = Field(default=False, description="choose the largest instead of the smallest `selected_by`")
    floor: float = Field(default=0.0, ge=0, description="smallest difference of the score worth naming; 0 names all")
    at: Setting = Field(default={}, description="hyperparameters held fixed on both sides")
    baseline_at: Setting | None = Field(default=None, description="on the baseline's side, in place of `at`")


class Figure(_Record):
    """A picture of the report."""

    kind: Literal["curves", "map"]
    caption: str
    score: str
    at: Setting = Field(default={}, description="hyperparameters held fixed")
    methods: list[str] = Field(description="curves: one line each, at the chosen setting; maps: one panel each")
    selected_by: str | None = Field(
        default=None,
        description="score by which a method's setting is chosen (smallest mean over seeds); null: `score`",
    )
    x: str | None = Field(default=None, description="map: hyperparameter along x")
    y: str | None = Field(default=None, description="map: hyperparameter along y")
    minus: str | None = Field(default=None, description="map: the method that is subtracted, seed by seed")


class Study(_Record):
    """Claims, runs, and everything needed to repeat them."""

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9\-]*$")
    title: str
    question: str
    scale: str = Field(description="model, data, steps and batch: what the results hold for")
    claims: list[Claim]
    figures: list[Figure] = []
    runs: list[Run]
    notes: list[str] = Field(default=[], description="what went otherwise than planned, and what did not work")
    commands: list[str] = Field(description="the commands that made it")
    commit: str | None
    machine: dict[str, Value]
    seconds: float = Field(description="computing time of all runs")


def load_study(path: str | PathLike[str]) -> Study:
    """Read a study.

    Raises:
        ValueError: if the file is no study, naming the field.
    """
    content = Path(path).expanduser().read_bytes()
    try:
        return Study.model_validate_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is no text in UTF-8 (byte {error.start} is {content[error.start]:#04x}). Save it as UTF-8."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        count = error.error_count()
        raise ValueError(
            f"{path}: {where}: {first['msg']}{_meant(first)}{f' ({count} problems in all)' if count > 1 else ''}."
        ) from error


def _meant(error: Mapping[str, Any]) -> str:
    """What an unknown field may have been meant to be."""
    if error["type"] != "extra_forbidden":
        return ""
    known = {name for record in (Study, Claim, Figure, Run) for name in record.model_fields}
    close = difflib.get_close_matches(str(error["loc"][-1]), sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def save_study(study: Study, path: str | PathLike[str]) -> None:
    """Write a study as JSON, one run a line; it appears under its name only when complete."""
    path = Path(path).expanduser()
    document: dict[str, Any] = {"format": study.format} | study.model_dump(exclude_defaults=True)
    runs = ",\n".join("  " + json.dumps(run) for run in document.pop("runs"))
    head = json.dumps(document, indent=1, ensure_ascii=False)
    with atomic_file(path) as partial:
        partial.write_text(f'{head[:-2]},\n "runs": [\n{runs}\n ]\n}}\n', encoding="utf-8")
