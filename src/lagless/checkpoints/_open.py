"""Opening a stored checkpoint: which files hold its weights, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lagless._validation import is_object
from lagless.checkpoints._checkpoint import Checkpoint
from lagless.checkpoints._codes import refuse_codes
from lagless.checkpoints._dcp import METADATA, find_dcp, open_dcp
from lagless.checkpoints._errors import CheckpointError, reporting
from lagless.checkpoints._json import read_object
from lagless.checkpoints._layouts import INSIDE, SUFFIXES, TORCH_SUFFIXES
from lagless.checkpoints._parameter_files import is_nanotron, open_nanotron, open_universal, universal_folder
from lagless.checkpoints._paths import absolute_path
from lagless.checkpoints._quantized import dequantized
from lagless.checkpoints._rank_files import open_rank_files, rank_files
from lagless.checkpoints._readers import FilePlace, Place
from lagless.checkpoints._safetensors_format import TensorInfo, read_header
from lagless.checkpoints._torch_file import open_torch
from lagless.checkpoints._weight_names import NOT_WEIGHTS, is_other_state

# In the order in which transformers and peft look for them; adapters are told apart by their name.
WEIGHT_FILES = tuple(
    f"{stem}{end}"
    for stem, plain in (
        ("model", ".safetensors"),
        ("pytorch_model", ".bin"),
        ("diffusion_pytorch_model", ".safetensors"),
    )
    for end in (plain, f"{plain}.index.json")
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a stored checkpoint without reading its weights.

    Args:
        path: a folder with ``model.safetensors``, ``adapter_model.safetensors``, ``pytorch_model.bin`` or
            ``adapter_model.bin``, or with the index and shards of one of the first two kinds; a folder that
            ``torch.distributed.checkpoint`` wrote, or with such a one named ``pytorch_model_fsdp_0`` in it; a folder
            of OLMo-core, verl, diffusers, nanotron, or a universal one of DeepSpeed; or one ``.safetensors``, ``.bin``,
            ``.pt``, ``.pth``, ``.pth.tar`` or ``.ckpt`` file.

    Raises:
        CheckpointError: if there are no weights, several candidates, a missing shard, a damaged file, or a type that
            cannot be averaged.
    """
    path = absolute_path(path)
    with reporting(path):
        return _open(path)


def _open(path: Path) -> Checkpoint:
    folder, companions = _places_in(path) if path.is_dir() else (path.parent, path)
    found = _read_description(folder if path.is_dir() else path)
    places, left_out = found.places, sorted(found.left_out)
    # An adapter is not quantized, even where its base model is.
    config = (companions if companions.is_dir() else folder) / "config.json"
    numbers = None if found.is_adapter else dequantized(config, places)
    if numbers is not None:
        places, left_out = numbers.places, [*left_out, *numbers.left_out]
    if not places:
        held = f", only other states ({', '.join(left_out[:3])}, ...)" if left_out else ""
        raise CheckpointError(f"{found.main}: holds no tensors{held}. Leave this checkpoint out.")
    refuse_codes(found.main, {name: info for name, (info, _) in places.items()})
    return Checkpoint(
        path,
        places,
        found.files,
        found.is_adapter,
        left_out,
        folder=folder,
        companions=companions,
        stem=found.stem,
        quantized=numbers and (numbers.method, numbers.dtype),
    )


@dataclass(frozen=True)
class _Description:
    """What the files of a checkpoint hold."""

    main: Path
    places: Mapping[str, tuple[TensorInfo, Place]]
    files: list[Path]
    left_out: Sequence[str] = ()
    is_adapter: bool = False
    stem: str | None = None


def _read_description(path: Path) -> _Description:
    if path.is_dir() and not _has_model_files(path):
        if dcp := find_dcp(path):
            places, files, left_out = open_dcp(dcp)
            return _Description(path, places, files, left_out)
        if files := rank_files(path):
            return _Description(path, open_rank_files(files), files)
        if zero := universal_folder(path):
            return _Description(path, *open_universal(zero))
        if is_nanotron(path):
            return _Description(path, *open_nanotron(path))
    main = _main_file(path) if path.is_dir() else path
    if not main.is_file():
        raise CheckpointError(f"{path}: no such checkpoint. Check the path (a broken link counts as missing).")
    if main.name.endswith(".index.json"):
        places, files = _open_shards(main)
    else:
        places, files = open_file(main), [main]
    left_out = list(filter(is_other_state, places))
    places = {name: place for name, place in places.items() if name not in left_out}
    stem = "diffusion_pytorch_model" if main.name.startswith("diffusion_pytorch_model.") else None
    return _Description(main, places, files, left_out, main.name in ADAPTER_FILES, stem)


def _places_in(folder: Path) -> tuple[Path, Path]:
    """The folder in ``folder`` that holds the weights, and the one that holds configuration and tokenizer."""
    if not _holds_own_weights(folder):
        for inside in INSIDE:
            found = [
                place for name in inside.folders if (place := folder / name).is_dir() and _holds_own_weights(place)
            ]
            if len(found) > 1:
                raise CheckpointError(
                    f"{folder}: {' and '.join(place.name for place in found)} hold weights of {inside.program}. "
                    f"Average them apart: give those that are meant as a list, e.g. checkpoint-*/{found[0].name}."
                )
            if found:
                companions = Path(os.path.normpath(found[0] / inside.companions))
                return found[0], companions if companions.is_dir() else found[0]
    return folder, folder


def holds_weights(folder: Path) -> bool:
    """Whether a folder has weights under one of the usual names."""
    return _holds_own_weights(folder) or any(
        _holds_own_weights(folder / name) for inside in INSIDE for name in inside.folders
    )


def _holds_own_weights(folder: Path) -> bool:
    return folder.is_dir() and (
        _has_model_files(folder)
        or find_dcp(folder) is not None
        or bool(rank_files(folder))
        or universal_folder(folder) is not None
        or is_nanotron(folder)
    )


def _has_model_files(folder: Path) -> bool:
    return any((folder / name).exists() for name in (*WEIGHT_FILES, *ADAPTER_FILES))


def _main_file(folder: Path) -> Path:
    model, adapter = (
        [folder / name for name in names if (folder / name).exists()] for names in (WEIGHT_FILES, ADAPTER_FILES)
    )
    if model and adapter:
        raise CheckpointError(
            f"{folder}: has both {model[0].name} and {adapter[0].name}. Give the file that is meant instead of the "
            "folder."
        )
    if model or adapter:
        return (model or adapter)[0]
    names = sorted(entry.name for entry in folder.iterdir())
    others = [
        name for name in names if name.endswith(SUFFIXES) and not NOT_WEIGHTS.search(name) and (folder / name).is_file()
    ]
    if len(others) == 1 and "-of-" not in others[0]:
        return folder / others[0]
    raise CheckpointError(
        f"{folder}: no weights found. Looked for {', '.join((*WEIGHT_FILES, *ADAPTER_FILES))}, or one file "
        f"*{', *'.join(SUFFIXES)}; found {_listing(names)}. {_advice(names, others)}"
    )


def _advice(names: list[str], others: list[str]) -> str:
    if any("-of-" in name for name in others):
        return "These are shards without their index: copy the *.index.json file too."
    if others:
        return "Give the file that is meant instead of the folder."
    if any(name.startswith("pytorch_model_fsdp") or name.endswith(".distcp") for name in names):
        return f"This is a sharded state without {METADATA}, which is written last: its save did not finish."
    if any(name.startswith("global_step") or name == "zero_to_fp32.py" for name in names):
        return "This is a DeepSpeed state: run the zero_to_fp32.py beside it first."
    return "If it is still being written, wait, or leave this checkpoint out."


def _listing(names: list[str]) -> str:
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"


def open_file(path: Path) -> Mapping[str, tuple[TensorInfo, Place]]:
    """The tensors of one file, and where they lie.

    Raises:
        CheckpointError: if the file is damaged, or of no known kind.
    """
    if path.suffix == ".safetensors":
        return {name: (info, FilePlace(path, offset)) for name, (info, offset) in read_header(path).items()}
    if path.name.endswith(TORCH_SUFFIXES):
        return open_torch(path)
    raise CheckpointError(
        f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}. Convert the weights to safetensors."
    )


def _open_shards(index: Path) -> tuple[dict[str, tuple[TensorInfo, Place]], list[Path]]:
    weight_map = _weight_map(index)
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{file}: this shard is missing, {index.name} lists it. Copy the checkpoint again, or leave it out."
            )
    shards = {file.name: open_file(file) for file in files}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index.parent / shard}: has no tensor {name!r}, which {index.name} places in it. The shards and the "
                "index are not of one save: copy the checkpoint again."
            )
    places: dict[str, tuple[TensorInfo, Place]] = {}
    for shard, held in shards.items():  # with tensors that the index omits: from_pretrained loads whole shards
        if twice := places.keys() & held.keys():
            raise CheckpointError(
                f"{index.parent / shard}: tensor {min(twice)!r} is in another shard too. The shards are not of one "
                "save: copy the checkpoint again."
            )
        places |= held
    return places, files


def _weight_map(index: Path) -> dict[str, str]:
    remedy = "Copy the checkpoint again, or leave it out."
    found = read_object(index, f"It should be an index of shards. {remedy}").get("weight_map")
    if not is_object(found) or not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
        raise CheckpointError(f"{index}: weight_map must give each tensor a file beside the index. {remedy}")
    return found
