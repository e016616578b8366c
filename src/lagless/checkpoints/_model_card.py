"""The card of an average: what was averaged, with which weights, and how to make it again."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lagless._validation import is_list, is_mapping, is_sequence
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._json import read_object
from lagless.rules import find_rule

CARD = "README.md"
TAGS = ("lagless", "weight-averaging")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MOST_ROWS = 24


def base_model_of(folder: Path) -> str | None:
    """Return the name on the hub of the model that a folder's configuration says it began with; None if it says none.

    Names of local folders are none: they mean nothing elsewhere.
    """
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        try:
            name = read_object(folder / file, "").get(key)
        except CheckpointError:
            continue
        if isinstance(name, str) and is_hub_name(name):
            return name
    return None


def is_hub_name(name: str) -> bool:
    """Whether ``name`` is of the form ``owner/name`` and no folder here.

    >>> is_hub_name("owner/model"), is_hub_name("./runs/sft"), is_hub_name("/data/model")
    (True, False, False)
    """
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith((".", "/", "~")) and not Path(name).exists()


def model_card(record: Mapping[str, Any], folder: Path | None = None, base_model: str | None = None) -> str:
    """Return the text of the card of an average.

    Args:
        record: what its ``lagless.json`` says.
        folder: of the model, or of what it was made from: tells the base model, and the library from files beside the
            weights; an earlier card in it lends its metadata.
        base_model: on the hub; None for what ``folder`` says.
    """
    from huggingface_hub import ModelCard, ModelCardData

    known: dict[str, Any] = {}
    if folder is not None and (folder / CARD).is_file():
        try:
            known = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
        except ValueError:  # no card, whatever its name
            known = {}
    base = base_model or known.get("base_model") or (None if folder is None else base_model_of(folder))
    library, relation = _library(folder)
    tags = known.get("tags")
    metadata: dict[str, Any] = {
        **known,
        "library_name": known.get("library_name") or library,
        "tags": list(dict.fromkeys([*(tags if is_list(tags) else ()), *TAGS])),
        "base_model": base,
        "base_model_relation": known.get("base_model_relation") or (relation if base else None),
    }
    data = ModelCardData(**{key: value for key, value in metadata.items() if value is not None})
    front: str = data.to_yaml()  # pyright: ignore[reportUnknownMemberType]
    return str(ModelCard(f"---\n{front}\n---\n\n" + "\n".join(_body(record)) + "\n"))


def _library(folder: Path | None) -> tuple[str | None, str]:
    if folder is None:
        return None, "finetune"
    if (folder / "adapter_config.json").is_file():
        return "peft", "adapter"
    try:
        config = read_object(folder / "config.json", "")
    except CheckpointError:
        return None, "finetune"
    return ("diffusers" if "_class_name" in config else "transformers"), "finetune"


def _body(record: Mapping[str, Any]) -> Iterator[str]:
    name, rule, sources = record.get("name"), record.get("rule"), record.get("sources")
    merged = is_sequence(sources) and all("step" not in source for source in sources)
    yield "# Merge of models" if merged else "# Average of a training run"
    yield ""
    version = f"[lagless](https://pypi.org/project/lagless/) {record.get('lagless', '')}".strip()
    what = f"the average `{name}`" if name else "an average"
    kept = f" that {record['optimizer']} keeps" if record.get("optimizer") else ""
    if is_sequence(sources):
        of = "models" if merged else "stored checkpoints of one run"
        yield f"This model is {what} of {len(sources)} {of}, made by {version}."
    else:
        updates = f", after {record['updates']:,} updates" if isinstance(record.get("updates"), int) else ""
        yield (
            f"This model is {what}{kept} of the weights during training, at optimizer step "
            f"{record.get('step')}{updates}, made by {version}."
        )
    yield ""
    if rule:
        yield f"Averaging rule: `{_rule_text(rule)}`."
        yield ""
    for key, text in (
        ("mean_age", "mean age: {:.4g} steps behind the last one"),
        ("effective_iterates", "effective number of iterates: {:.4g}"),
    ):
        if isinstance(record.get(key), (int, float)):
            yield f"- {text.format(record[key])}"
    if is_mapping(losses := record.get("losses")) and losses:
        yield ""
        yield "## Losses"
        yield ""
        yield "| | |"
        yield "|---|---|"
        for key, value in losses.items():
            yield f"| {key} | {value:.6g} |" if isinstance(value, float) else f"| {key} | {value} |"
    if merged and is_sequence(sources):
        yield from _merged(sources, record.get("groups"))
    elif is_sequence(sources):
        yield from _sources(sources, record.get("equivalent_schedule"))
    elif is_mapping(schedule := record.get("schedule")):
        yield from _schedule(schedule)
    yield ""
    yield "## How to make it again"
    yield ""
    yield from _again(record, merged)


def _sources(sources: Sequence[Mapping[str, Any]], schedule: Any) -> Iterator[str]:
    yield ""
    yield "## Checkpoints and weights"
    yield ""
    yield "To first order the average equals this run with its learning rate multiplied, on the way to each step, by"
    yield "the last column."
    yield ""
    yield "| step | checkpoint | weight | learning rate × |"
    yield "|---:|---|---:|---:|"
    multipliers = list(schedule) if is_sequence(schedule) else []
    rows = list(enumerate(sources))
    shown = rows if len(rows) <= _MOST_ROWS else [*rows[: _MOST_ROWS // 2], None, *rows[-_MOST_ROWS // 2 :]]
    for row in shown:
        if row is None:
            yield "| ... | | | |"
            continue
        i, source = row
        factor = f"{multipliers[i]:.4f}" if 0 < i < len(multipliers) else ""
        yield f"| {source.get('step')} | `{source.get('name')}` | {source.get('weight', 0.0):+.6f} | {factor} |"


def _merged(sources: Sequence[Mapping[str, Any]], groups: Any) -> Iterator[str]:
    yield ""
    yield "## Models and weights"
    yield ""
    for name, pattern in groups.items() if is_mapping(groups) else ():
        yield f"- {name}: tensors with `{pattern}` in their name"
    names = list(dict.fromkeys(name for source in sources for name in source.get("weights", ())))
    if names:
        yield ""
    yield f"| model | {' | '.join(names or ['weight'])} |"
    yield f"|---|{'---:|' * max(1, len(names))}"
    for source in sources:
        weights = source.get("weights") or {"weight": source.get("weight", 0.0)}
        yield f"| `{source.get('name')}` | {' | '.join(f'{weight:+.6f}' for weight in weights.values())} |"


def _schedule(schedule: Mapping[str, float]) -> Iterator[str]:
    yield ""
    yield "## The schedule it equals"
    yield ""
    yield "To first order the average equals this run with its learning rate multiplied, on the way to each step, by"
    yield ""
    yield "| step | learning rate × |"
    yield "|---:|---:|"
    for step, factor in schedule.items():
        yield f"| {step} | {factor:.4f} |"


def _options(record: Mapping[str, Any]) -> str:
    """The options beside the weights with which the same checkpoints are averaged in the same way."""
    start: Any = record.get("start")
    given = is_mapping(start) and start.get("chosen") == "given"
    return (f" --start {shlex.quote(str(start['name']))} --start-step {start['step']}" if given else "") + (
        " --merged-lora" if record.get("merged_lora") else ""
    )


def _again(record: Mapping[str, Any], merged: bool) -> Iterator[str]:
    rule, sources = record.get("rule"), record.get("sources")
    yield "`lagless.json` beside this file holds all numbers."
    yield ""
    if merged:
        yield "```python"
        yield "import json"
        yield "from lagless.posthoc import merge_models"
        yield ""
        yield 'record = json.load(open("lagless.json"))'
        yield 'merge_models(MODELS, record["weights"], OUT, groups=record.get("groups"))'
        yield "```"
        return
    if is_sequence(sources):
        yield "```bash"
        yield f"lagless average RUN --weights lagless.json{_options(record)} -o OUT"
        yield "```"
        return
    yield "```python"
    yield "import json"
    yield "from lagless import Averager"
    yield "from lagless.rules import rule_from_dict"
    yield ""
    if isinstance(rule, Mapping):
        yield 'rule = rule_from_dict(json.load(open("lagless.json"))["rule"])'
        yield "averager = Averager(model, rule)  # or AveragingCallback(rule) in a trainer"
        yield "averager.attach(optimizer)"
    else:
        yield 'record = json.load(open("lagless.json"))  # the optimizer, and the rule of each of its groups'
    yield "```"


def _rule_text(rule: Any) -> str:
    """The rule as it is written in Python, without what its defaults say."""
    if is_list(rule):
        return "; ".join(map(_rule_text, rule))
    kind, defaults = rule.get("rule"), {}
    try:
        defaults = {p.name: p.default for p in inspect.signature(find_rule(str(kind))).parameters.values()}
    except ValueError:  # of somebody's own, not imported here
        pass
    given = {key: value for key, value in rule.items() if key not in ("rule", "module")}
    changed = {key: value for key, value in given.items() if key not in defaults or value != defaults[key]}
    return f"{kind}({', '.join(f'{key}={value!r}' for key, value in changed.items())})"
