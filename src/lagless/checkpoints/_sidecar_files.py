"""What lies beside the weights and a model needs in order to load: configuration, tokenizer, custom code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lagless._validation import is_object
from lagless.checkpoints._errors import CheckpointError, reporting
from lagless.checkpoints._json import read_object
from lagless.checkpoints._layouts import step_named
from lagless.checkpoints._permissions import Permissions
from lagless.checkpoints._run_folder import holds_averages
from lagless.checkpoints._weight_names import NOT_WEIGHTS

# Weights in any format, logs, results and the card of the checkpoint: they are not the average's.
_LEFT = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.distcp", "*.index.json", "*.pkl", "*.pickle", "*.npy"),
    *("*.npz", "*.onnx", "*.onnx_data", "*.gguf", "*.h5", "*.msgpack", "*.tflite", "*.mlmodel", "*.tar*", "*.zip"),
    *("events.out.tfevents*", "*.log", "*.jsonl", "*.csv", "*_results.json", "*.lock", "*.tmp", "*.partial", "*~"),
    *("README*", "zero_to_fp32.py", "latest", "lagless.json", "__pycache__", "runs", "wandb", "mlruns", "logs", "eval"),
    *("pytorch_model_fsdp_*", "hf_quant_config.json", "recipe.yaml"),
)
_QUANTIZATION = ("quantization_config", "compression_config")
_TOKENIZERS = ("tokenizer*", "*vocab*")  # in whatever format

# Of a folder that one file was chosen from, which may be anything, only what is known to go with a model.
_KNOWN = (
    *("config.json", "generation_config.json", "adapter_config.json", "modules.json", "*processor_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "normalizer.json"),
    *("spiece.model", "*.spm", "*.bpe.model", "*.tiktoken", "tekken.json", "bpe.codes", "dict.txt", "*.jinja"),
    *("chat_template.json", "LICENSE*", "NOTICE*"),
)


def sidecar_files(source: Path) -> list[Path]:
    """The files to carry over from beside weights, with those in sub-folders.

    Args:
        source: the folder of a checkpoint, of which everything goes along but weights, states of training, logs and
            the model card; or a file of weights, with which goes what is known by name.

    Raises:
        CheckpointError: if one of them is a link that leads nowhere.
    """
    folder = source if source.is_dir() else source.parent
    with reporting(folder):
        found = list(_files(folder) if source.is_dir() else _known_files(folder))
    for file in found:
        if not file.exists():
            raise CheckpointError(f"{file}: this link leads nowhere. Repair it, or remove it.")
    return found


def _files(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or not _is_carried(entry.name):
            continue
        if entry.is_dir():
            if not (entry.is_symlink() or step_named(entry) or holds_averages(entry)):
                yield from _files(entry)
        elif entry.is_file() or entry.is_symlink():
            yield entry


def _is_carried(name: str) -> bool:
    if NOT_WEIGHTS.search(name):
        return re.fullmatch(r"noise_scheduler.*|scheduler(_config)?(\.json)?", name) is not None
    return any(fnmatch(name, pattern) for pattern in _TOKENIZERS) or not any(fnmatch(name, p) for p in _LEFT)


def _known_files(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() and any(fnmatch(entry.name, pattern) for pattern in _KNOWN):
            yield entry


def copy_sidecar_files(source: Path, destination: Path, dtype: str = "auto", dequantized: bool = False) -> None:
    """Copy what lies beside the weights in ``source`` into ``destination``; nobody may read more than before.

    Args:
        source: the folder of a checkpoint, or its file; see :func:`sidecar_files`.
        destination: an existing folder.
        dtype: the type of the weights beside the copies; unless ``"auto"``, ``config.json`` is made to say so, because
            ``from_pretrained`` loads weights in the type that it names.
        dequantized: whether the weights beside the copies were quantized and are no more; then ``config.json`` is made
            to say so.

    Raises:
        CheckpointError: if ``config.json`` has to be changed and is no JSON object.
    """
    folder = source if source.is_dir() else source.parent
    for entry in sidecar_files(source):
        target = destination / entry.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry == folder / "config.json" and (dtype != "auto" or dequantized):
            config = read_object(
                entry, "The type of the weights cannot be set in it: repair it, or keep the type with dtype='auto'."
            )
            if dequantized:
                config = {key: value for key, value in config.items() if key not in _QUANTIZATION}
            if dtype != "auto":
                _set_dtype(config, dtype)
            if dtype != "auto" and "dtype" not in config and "torch_dtype" not in config:
                config["dtype"] = dtype
            target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(entry, target)
        Permissions(files=entry.stat().st_mode).apply_to(target)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Replace the type named in a configuration and in the configurations nested in it."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = dtype
        elif is_object(value):
            _set_dtype(value, dtype)
