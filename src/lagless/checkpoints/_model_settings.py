"""The settings that give weights their meaning: equal in all checkpoints of a run, or their average is none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lagless._validation import is_list, is_object
from lagless.checkpoints._checkpoint import Checkpoint
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._json import read_object

# Where and with what a model was saved or trained, or what is generated with it; the function of the weights does not
# depend on it.
_HARMLESS = re.compile(
    r"(transformers|peft|diffusers|sentence_transformers|unsloth)_version|_?name_or_path|_commit_hash|revision|"
    r"(torch_)?dtype|use_cache|_?attn_implementation\w*|_experts_implementation\w*|output_\w+|(use_)?return_dict\w*|"
    r"gradient_checkpointing|auto_map|auto_mapping|inference_mode|\w+_token_ids?|\w*drop(out|path)?\w*|\w+_pdrop|"
    r"\w*initializer\w*|init_\w+|(eva|corda|loftq)_config|\w*loss\w*|max_position_embeddings|unsloth\w*|"
    r"task_specific_params|finetuning_task|runtime_config"
)
_SETS = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")  # peft writes them in any order
_ROPE = re.compile(r"(.*\.)?rope_(parameters|scaling)\.(.*)")  # names that versions of transformers give
_VERSIONS = ("transformers_version", "peft_version")
_REMEDY = (
    "The same numbers mean other weights there. Leave out checkpoints of another run; if the difference has no "
    "meaning, make the files agree."
)


def check_settings(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints whose configurations differ in what gives weights their meaning.

    Compared are ``config.json``, or ``adapter_config.json`` of adapters, where checkpoints have them. What only one
    of two versions of a library writes is no difference, unless it switches something on.

    Raises:
        CheckpointError: naming the first setting, its values and both files.
    """
    name = "adapter_config.json" if checkpoints[-1].is_adapter else "config.json"
    files = [path for path in dict.fromkeys(_beside(c) / name for c in checkpoints) if path.exists()]
    if len(files) < 2:
        return
    *others, last = [(path, read_object(path, "Repair it, or leave this checkpoint out.")) for path in files]
    for other in others:
        for key, one, two in _differences(other[1], last[1]):
            raise CheckpointError(f"{key} is {one!r} in {other[0]}, but {two!r} in {last[0]}. {_REMEDY}")


def _beside(checkpoint: Checkpoint) -> Path:
    place = checkpoint.companions
    return place if place.is_dir() else place.parent


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    same_version = all(one.get(key) == other.get(key) for key in _VERSIONS)
    first, second = dict(_leaves(one)), dict(_leaves(other))
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key), second.get(key)
        if _plain(a) == _plain(b):
            continue
        absent = key not in first or key not in second
        if absent and not same_version and a is not True and b is not True:
            continue
        yield key, a, b


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if _HARMLESS.fullmatch(str(key)):
            continue
        if is_object(value) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif key in _SETS and is_list(value):
            yield prefix + key, sorted(map(str, value))
        else:
            yield _canonical(prefix + str(key)), value


def _canonical(key: str) -> str:
    """The name of a setting of rotary embeddings in all versions of transformers."""
    match = _ROPE.fullmatch(key)
    if match is None:
        return key
    inner = {"type": "rope_type"}.get(match[3], match[3])
    return (match[1] or "") + (inner if inner == "rope_theta" else f"rope.{inner}")


def _plain(value: Any) -> Any:
    """The value, or None for one that switches nothing on."""
    return None if value in (None, False, "", [], {}, "default") and not _is_zero(value) else value


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
