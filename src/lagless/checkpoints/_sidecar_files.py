"""The small files beside the weights that a model needs in order to load: configuration, tokenizer, custom code."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lagless.checkpoints._errors import CheckpointError

CARRIED = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "spiece.model",
    "*.spm",
    "*.bpe.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
_TEMPLATES = "additional_chat_templates"
_NEVER = ("zero_to_fp32.py",)


def sidecar_files(folder: Path) -> list[Path]:
    """The files and folders of ``folder`` to carry over; an allow list, so that no optimizer state ever is.

    Python files go along only where a configuration refers to them (``auto_map``).
    """
    patterns = (*CARRIED, "*.py") if _has_custom_code(folder) else CARRIED
    found = [
        entry
        for entry in sorted(folder.iterdir())
        if entry.is_file() and entry.name not in _NEVER and any(fnmatch(entry.name, pattern) for pattern in patterns)
    ]
    return found + [folder / _TEMPLATES] * (folder / _TEMPLATES).is_dir()


def copy_sidecar_files(source: Path, destination: Path, dtype: str = "auto") -> None:
    """Copy the companions of the weights in ``source`` into ``destination``.

    Args:
        source: the folder of a checkpoint.
        destination: an existing folder.
        dtype: the type of the weights beside the copies; unless ``"auto"``, ``config.json`` is made to say so, because
            ``from_pretrained`` loads weights in the type that it names.

    Raises:
        CheckpointError: if ``config.json`` has to be changed and is no JSON object.
    """
    for entry in sidecar_files(source):
        if entry.is_dir():
            shutil.copytree(entry, destination / entry.name)
        elif entry.name == "config.json" and dtype != "auto":
            config = _read_config(entry)
            _set_dtype(config, dtype)
            if "dtype" not in config and "torch_dtype" not in config:
                config["dtype"] = dtype
            (destination / entry.name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(entry, destination / entry.name)


def _has_custom_code(folder: Path) -> bool:
    for name in ("config.json", "tokenizer_config.json"):
        try:
            if "auto_map" in json.loads((folder / name).read_text(encoding="utf-8")):
                return True
        except (OSError, ValueError, TypeError):
            continue
    return False


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a configuration ({error}), so the type of the weights cannot be set in it. Repair it, or "
            "keep the type with dtype='auto'."
        ) from error
    return config


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Replace the type named in a configuration and in the configurations nested in it."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)
