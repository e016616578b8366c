"""Damage checkpoints at random: their average is refused with a message, or it is right.

    python -m tests.checkpoints.fuzz_checkpoints 1000               # cases of each kind
    python -m tests.checkpoints.fuzz_checkpoints 1 --kind dcp --seed 77  # one case again

Every case averages a run of three checkpoints, one of them damaged, in a process of its own. What is right is computed
from the damaged files by other readers: the safetensors library, ``torch.load`` and ``torch.distributed.checkpoint``.
Where those refuse a file that lagless takes, the values must be those from before the damage.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from tests.forked_cases import in_child
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lagless import EMA
from lagless.checkpoints import CheckpointError
from lagless.posthoc import average_checkpoints

Chance = random.Random
State = dict[str, torch.Tensor]

STEPS, WEIGHTS = (1, 2, 3), (0.25, 0.25, 0.5)
RULE = EMA(decay=0.5, update_freq=1)
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "base_model_name_or_path": "base"}
HARMLESS = {"lora_dropout": 0.1, "inference_mode": False, "revision": "x", "init_lora_weights": "gaussian"}
SECONDS = 60  # for one case


def state_of(step: int) -> State:
    generator = torch.Generator().manual_seed(step)
    shapes = {"a.weight": (7, 5), "b.weight": (40,), "c.scale": ()}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state | {"half": torch.randn(6, generator=generator).bfloat16(), "count": torch.arange(3) + step}


# --- Damage to bytes and to JSON


def damage_bytes(data: bytes, chance: Chance) -> bytes:
    """Flip, cut, lengthen, repeat, clear or exchange bytes."""
    content, size = bytearray(data), max(len(data), 1)
    at, length = chance.randrange(size), chance.choice([1, 2, 4, 8, 16, 64])
    kind = chance.randrange(7)
    if kind == 0:
        content[at : at + 1] = bytes([chance.randrange(256)])
    elif kind == 1:
        content[at : at + 1] = bytes([content[at] ^ (1 << chance.randrange(8))]) if content else b""
    elif kind == 2:
        del content[at:]
    elif kind == 3:
        content += chance.randbytes(length)
    elif kind == 4:
        content[at:at] = content[at : at + length]
    elif kind == 5:
        content[at : at + length] = bytes(min(length, len(content) - at))
    else:
        other = chance.randrange(size)
        content[at : at + length], content[other : other + length] = (
            content[other : other + length],
            content[at : at + length],
        )
    return bytes(content)


ODD: list[Any] = [None, True, -1, 0, 3, 10**20, 1.5, "", "x", [], {}, [[]], "../x", "F16", "U8", [1], [-1, 2]]


def damage_json(value: Any, chance: Chance) -> Any:
    """Change, drop, rename or exchange something in a JSON value, at any depth."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        copy, key = dict(value), chance.choice(list(value))
        kind = chance.randrange(5)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[chance.choice(["a.weight", "zz", "", "optimizer.x", "b.weight"])] = copy.pop(key)
        elif kind == 2:
            other = chance.choice(list(value))
            copy[key], copy[other] = copy[other], copy[key]
        else:
            copy[key] = damage_json(value[key], chance)
        return copy
    if isinstance(value, list) and value and chance.random() < 0.7:
        copy, at = list(value), chance.randrange(len(value))
        copy[at] = damage_json(value[at], chance)
        return copy
    if type(value) is int and chance.random() < 0.7:
        return value + chance.choice([-4, -1, 1, 4, 100])
    if chance.random() < 0.03:
        return json.loads("[" * 400 + "]" * 400)
    return chance.choice(ODD)


def damage_json_text(text: bytes, chance: Chance) -> bytes:
    if chance.random() < 0.05:
        return b'{"a":' * 9000 + b"1" + b"}" * 9000
    if chance.random() < 0.25:
        return damage_bytes(text, chance)
    return json.dumps(damage_json(json.loads(text), chance)).encode()


# --- Kinds of checkpoints: how they are written, damaged, and read by others


def write_safetensors(folder: Path, state: State) -> None:
    save_file(state, folder / "model.safetensors")


def damage_safetensors(folder: Path, chance: Chance, name: str = "model.safetensors") -> None:
    path = folder / name
    data = path.read_bytes()
    if chance.random() < 0.4:
        path.write_bytes(damage_bytes(data, chance))
        return
    (length,) = struct.unpack("<Q", data[:8])
    try:
        text = damage_json_text(data[8 : 8 + length], chance)
    except (ValueError, RecursionError):  # damaged before
        text = damage_bytes(data[8:], chance)[:length]
    text += b" " * (chance.choice([-len(text) % 8, 0, 3]))
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def read_safetensors(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def write_shards(folder: Path, state: State) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(state)}
    for file in names:
        save_file({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    text = json.dumps({"metadata": {"total_size": 300}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def damage_shards(folder: Path, chance: Chance) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    kind = chance.randrange(6)
    if kind < 3 and index.exists():
        try:
            index.write_bytes(damage_json_text(index.read_bytes(), chance))
        except (ValueError, RecursionError):
            index.write_bytes(damage_bytes(index.read_bytes(), chance))
    elif kind == 3 and shards:
        damage_safetensors(folder, chance, chance.choice(shards).name)
    elif kind == 4 and shards:
        other = chance.choice([path for path in folder.parent.iterdir() if path != folder])
        chance.choice(shards).write_bytes((other / chance.choice(shards).name).read_bytes())
    elif shards:
        chance.choice(shards).unlink()


def read_shards(folder: Path) -> State:
    """As from_pretrained does: all tensors of the shards that the index names."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    state: State = {}
    for file in sorted(set(weight_map.values())):
        state |= load_file(folder / file)
    return state


def write_torch(folder: Path, state: State) -> None:
    transposed = state | {"a.weight": state["a.weight"].T.contiguous().T}
    torch.save(
        {"state_dict": transposed, "step": 3} if state["count"][0] == 1 else transposed, folder / "pytorch_model.bin"
    )


def damage_torch(folder: Path, chance: Chance) -> None:
    path = folder / "pytorch_model.bin"
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(item.filename, archive.read(item)) for item in archive.infolist()]
            directory = archive.start_dir
    except Exception:  # damaged before
        records, directory = [], 0
    kind = chance.randrange(8)
    if kind < 2 or not records:
        path.write_bytes(damage_bytes(data, chance))
    elif kind == 2:  # sizes, methods, places and names in the directory
        path.write_bytes(data[:directory] + damage_bytes(data[directory:], chance))
    else:
        path.write_bytes(zipped(damage_records(records, chance), chance))


def damage_records(records: list[tuple[str, bytes]], chance: Chance) -> list[tuple[str, bytes]]:
    at, other = (chance.randrange(len(records)) for _ in range(2))
    (name, data), (other_name, other_data) = records[at], records[other]
    kind = chance.randrange(7)
    if kind == 0:
        del records[at]
    elif kind == 1:
        records.append((name, other_data))
    elif kind == 2:
        records[at], records[other] = (name, other_data), (other_name, data)
    elif kind == 3:
        records[at] = (chance.choice([name + "x", name.replace("/0", "/1"), "data.pkl", "x/byteorder"]), data)
    elif kind == 4:
        records = [(n, damage_bytes(d, chance) if n.endswith("data.pkl") else d) for n, d in records]
    elif kind == 5:
        records[at] = (name, damage_bytes(data, chance))
    return records


def zipped(records: list[tuple[str, bytes]], chance: Chance) -> bytes:
    out = io.BytesIO()
    compressed = chance.random() < 0.4
    methods = [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED]
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in records:
            archive.writestr(name, data, chance.choice(methods) if compressed else zipfile.ZIP_STORED)
    return out.getvalue()


def read_torch(folder: Path) -> State:
    path = folder / "pytorch_model.bin"
    try:
        content = torch.load(path, weights_only=True)
    except Exception:  # a wrong checksum; without one, where elements lie in the file as they are
        with zipfile.ZipFile(path) as archive:
            assert all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
        content = torch.load(path, weights_only=True, mmap=True)
    return content.get("state_dict", content)


def write_dcp(folder: Path, state: State) -> None:
    content = {"model": state, "optimizer": {"state": {"a.weight": {"exp_avg": torch.ones(7, 5)}}}}
    dcp.save(content, checkpoint_id=folder, no_dist=True)


def damage_dcp(folder: Path, chance: Chance) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        return
    kind, path = chance.randrange(8), chance.choice(files)
    if kind < 3:
        path.write_bytes(damage_bytes(path.read_bytes(), chance))
    elif kind == 3:
        path.unlink()
    elif kind == 4:
        other = chance.choice([item for item in folder.parent.iterdir() if item != folder])
        if (other / path.name).exists():
            path.write_bytes((other / path.name).read_bytes())
    else:
        try:
            metadata = pickle.loads((folder / ".metadata").read_bytes())  # written by this script
            for _ in range(chance.randrange(1, 3)):
                damage_description(metadata, chance)
            (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        except Exception:  # damaged before
            path.write_bytes(damage_bytes(path.read_bytes(), chance))


def damage_description(metadata: Any, chance: Chance) -> None:
    keys = list(metadata.storage_data)
    index, other = chance.choice(keys), chance.choice(keys)
    info, kind = metadata.storage_data[index], chance.randrange(6)
    if kind == 0:
        metadata.storage_data[index], metadata.storage_data[other] = metadata.storage_data[other], info
    elif kind == 1:
        object.__setattr__(
            info, chance.choice(["offset", "length"]), chance.choice([0, -5, 7, info.offset + 64, 10**9])
        )
    elif kind == 2:
        object.__setattr__(info, "relative_path", chance.choice(["x", "../x", "", None, 3]))
    elif kind == 3:
        del metadata.storage_data[index]
    else:
        tensor = chance.choice([item for item in metadata.state_dict_metadata.values() if hasattr(item, "chunks")])
        if kind == 4 and tensor.chunks:
            chunk = chance.choice(tensor.chunks)
            field = chance.choice(["offsets", "sizes"])
            values = [value + chance.choice([-1, 0, 1]) for value in getattr(chunk, field)]
            setattr(chunk, field, chance.choice([torch.Size(values), tuple(values), None]))
            if chance.random() < 0.5:
                tensor.chunks.append(chunk)
        else:
            tensor.size = torch.Size([value + chance.choice([-1, 0, 1]) for value in tensor.size])


def read_dcp(folder: Path) -> State:
    with tempfile.TemporaryDirectory() as scratch:
        dcp_to_torch_save(folder, Path(scratch) / "x.pt")
        return torch.load(Path(scratch) / "x.pt", weights_only=True)["model"]


def write_adapter(folder: Path, state: State) -> None:
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(LORA | HARMLESS))


def damage_adapter(folder: Path, chance: Chance) -> None:
    config = folder / "adapter_config.json"
    if chance.random() < 0.6:
        try:
            config.write_bytes(damage_json_text(config.read_bytes(), chance))
        except (ValueError, RecursionError):
            config.write_bytes(damage_bytes(config.read_bytes(), chance))
    else:
        damage_safetensors(folder, chance, "adapter_model.safetensors")


def read_adapter(folder: Path) -> State:
    config = json.loads((folder / "adapter_config.json").read_text())
    differing = {key: config.get(key) for key in LORA if (config.get(key) or None) != (LORA[key] or None)}
    assert not differing, f"another meaning: {differing}"
    return load_file(folder / "adapter_model.safetensors")


KINDS: dict[str, tuple[Callable[[Path, State], None], Callable[[Path, Chance], None], Callable[[Path], State]]] = {
    "safetensors": (write_safetensors, damage_safetensors, read_safetensors),
    "index": (write_shards, damage_shards, read_shards),
    "torch": (write_torch, damage_torch, read_torch),
    "dcp": (write_dcp, damage_dcp, read_dcp),
    "adapter": (write_adapter, damage_adapter, read_adapter),
}


# --- A case


def try_case(kind: str, seed: int) -> tuple[str, str]:
    """Run one case in a child process. Returns its outcome: right, refused, wrong, raw or crash, and details."""
    return in_child(lambda: _case(kind, seed), SECONDS)


def _case(kind: str, seed: int) -> tuple[str, str]:
    warnings.simplefilter("ignore")
    write, damage, read = KINDS[kind]
    chance = Chance(f"{kind} {seed}")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, "run", f"checkpoint-{step}") for step in STEPS]
        for folder, step in zip(folders, STEPS, strict=True):
            folder.mkdir(parents=True)
            write(folder, state_of(step))
        target = chance.choice(folders)
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            damage(target, chance)
        shrinking = chance.random() < 0.05

        def progress(done: int, total: int) -> None:
            if shrinking and done < total:
                largest = max(
                    (path for path in target.iterdir() if path.is_file()), key=lambda path: path.stat().st_size
                )
                os.truncate(largest, largest.stat().st_size // 2)

        try:
            average_checkpoints(folders[0].parent, RULE, Path(scratch, "out"), progress=progress)
        except CheckpointError as error:
            named = scratch in str(error)
            return ("refused", str(error)) if named else ("raw", f"no file is named: {error}")
        except Exception:
            return "raw", traceback.format_exc()
        found: State = {}
        for file in Path(scratch, "out").glob("*.safetensors"):
            found |= load_file(file)
        try:
            states = [read(folder) for folder in folders]
        except AssertionError as error:
            return "wrong", f"accepted: {error}"
        except (Exception, CheckpointException):  # lagless read what others refuse
            states = [state_of(step) for step in STEPS]
        return _compare(found, states)


def _compare(found: State, states: list[State]) -> tuple[str, str]:
    if found.keys() != states[-1].keys():
        return "wrong", f"tensors {sorted(found)}, expected {sorted(states[-1])}"
    for name, tensor in found.items():
        values = [state[name] for state in states]
        if not tensor.is_floating_point():
            if not torch.equal(tensor, values[-1]):
                return "wrong", f"{name} is {tensor.tolist()}, expected {values[-1].tolist()}"
            continue
        expected = sum((w * value.double() for w, value in zip(WEIGHTS, values, strict=True)), torch.zeros(()))
        bound = (
            2 * torch.finfo(tensor.dtype).eps * sum(w * v.double().abs() for w, v in zip(WEIGHTS, values, strict=True))
        )
        if tensor.shape != expected.shape or not ((tensor.double() - expected).abs() <= bound + 1e-37).all():
            return "wrong", f"{name} is {tensor.tolist()}, expected {expected.tolist()}"
    return "right", ""


def prepare() -> None:
    """Compile and import what cases need, once for all children, and see that without damage all is right."""
    torch.set_num_threads(1)
    for kind, (write, _, read) in KINDS.items():
        with tempfile.TemporaryDirectory() as scratch:
            for step in STEPS:
                folder = Path(scratch, "run", f"checkpoint-{step}")
                folder.mkdir(parents=True)
                write(folder, state_of(step))
                assert all(torch.equal(read(folder)[name], tensor) for name, tensor in state_of(step).items()), kind
            average_checkpoints(Path(scratch, "run"), RULE, Path(scratch, "out"))
            (file,) = Path(scratch, "out").glob("*.safetensors")
            outcome, details = _compare(load_file(file), [state_of(step) for step in STEPS])
            assert outcome == "right", f"{kind}: {details}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="cases of each kind")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    prepare()
    failed = 0
    for kind in options.kind or KINDS:
        counts: Counter[str] = Counter()
        for seed in range(options.seed, options.seed + options.count):
            outcome, details = try_case(kind, seed)
            counts[outcome] += 1
            if outcome not in ("right", "refused"):
                failed += 1
                print(f"{kind} --seed {seed}: {outcome}: {details}", flush=True)
        kept = {outcome: counts[outcome] for outcome in ("right", "refused", "wrong", "raw", "crash")}
        print(kind, ", ".join(f"{count} {outcome}" for outcome, count in kept.items()), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
