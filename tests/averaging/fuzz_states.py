"""Damage states of Averagers at random: each is refused with a message, or does what it says.

    python -m tests.averaging.fuzz_states 1000                          # cases of each kind
    python -m tests.averaging.fuzz_states 1 --kind float32 --seed 77    # one case again

Every case loads a damaged state, or a damaged file, into an Averager that has updated before. A refusal must be a
ValueError of lagless that names what was damaged, and leave the Averager as it was. After a load, reads and updates
must equal those of another Averager, into which the damaged state was written entry by entry.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

import lagless
from lagless import BEMA, DEMA, EMA, OUEMA, Averager, DecayAverage, PowerEMA, UniformAverage, WindowAverage
from lagless.rules import Rule, Tick

Chance = random.Random
Path_ = tuple[Any, ...]
SOURCES = str(Path(lagless.__file__).parent)

RULES: dict[str, Rule] = {
    "bema": BEMA(),
    "bema-paper": BEMA.paper(update_freq=2, update_after=1),
    "ema": EMA(decay=0.7),
    "shared": EMA(decay=0.7),
    "ouema": OUEMA.paper(update_freq=3),
    "dema": DEMA.paper(update_freq=2),
    "power": PowerEMA(relative_width=0.1),
    "mean": UniformAverage(update_after=2),
    "lawa": WindowAverage(window=2),
    "late": EMA(half_life=3.0, update_after=9),
    "decay": DecayAverage(total_steps=20),
}
SMALL: dict[str, Rule] = {"slow": EMA(decay=0.999), "ema": EMA(decay=0.9)}  # has low bits

KINDS: dict[str, tuple[dict[str, Rule], torch.dtype, dict[str, Any]]] = {
    "float32": (RULES, torch.float32, {}),
    "bfloat16-averages": (RULES, torch.float32, {"dtype": torch.bfloat16, "seed": 7}),
    "bfloat16-weights": (RULES, torch.bfloat16, {}),
    "float64-averages": (RULES, torch.float32, {"dtype": torch.float64}),
    "low-bits": (SMALL, torch.float32, {}),
    "file": (SMALL | {"bema": RULES["bema"]}, torch.float32, {}),
}
SHAPES = {"a": (3, 4), "b": (3, 4), "c": (5,), "d/e": (), "f": (4, 3)}


def weights_at(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def follow(averager: Averager, live: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        for name, value in weights_at(step, live["a"].dtype).items():
            live[name].copy_(value)
        averager.update()


def make(kind: str, steps: int) -> tuple[Averager, dict[str, Tensor]]:
    rules, dtype, options = KINDS[kind]
    live = weights_at(0, dtype)
    averager = Averager(live, rules, **options)
    follow(averager, live, range(1, steps + 1))
    return averager, live


# --- Damage

ODD: list[Callable[[], Any]] = [
    *(lambda value=value: copy.deepcopy(value) for value in (
        None, True, False, -1, 0, 1, 3, 2**53, 2**53 + 1, 10**400, 1.5, 4.0, math.nan, math.inf, "", "x", "ema.0",
        "live/", "live/0123456789abcdef/a", "ema.0.low", [], {}, [[]], ["ema.0"], {"a": 1}, (), b"x", {1: 2}, {1, 2},
    )),
    lambda: torch.zeros(()),
    lambda: torch.ones(3, 4),
    lambda: range(3),
]  # fmt: skip


def paths(value: Any, here: Path_ = ()) -> list[Path_]:
    """Every place in a state, but the whole."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: list[Path_] = []
    for key, item in items:
        found += [(*here, key), *paths(item, (*here, key))]
    return found


def at(state: Any, path: Path_) -> Any:
    for key in path:
        state = state[key]
    return state


def damage(state: Any, chance: Chance) -> list[Path_]:
    """Change a state in one place or two, and return which."""
    everywhere = paths(state)
    leaves = [path for path in everywhere if not isinstance(at(state, path), dict | list)]
    path = chance.choice(leaves if chance.random() < 0.8 else everywhere)
    owner, key = at(state, path[:-1]), path[-1]
    value, kind = owner[key], chance.randrange(8)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        new = chance.choice([f"{key}x", "", "zz/a", 5, f"zz.0/{key}"])
        owner[new] = value if chance.random() < 0.5 else owner.pop(key)
        return [path, (*path[:-1], new)]
    elif kind == 1:
        owner.insert(chance.randrange(len(owner) + 1), value)
    elif kind == 2:
        other = chance.choice([p for p in everywhere if p[:-1] == path[:-1]])
        owner[key], owner[other[-1]] = owner[other[-1]], owner[key]
        return [path, other]
    elif isinstance(value, Tensor) and kind != 3:
        owner[key] = damage_tensor(value, chance)
    elif isinstance(value, int) and not isinstance(value, bool) and kind != 3:
        owner[key] = value + chance.choice([-3, -2, -1, 1, 2, 3, 400, -(10**6), 10**30])
    elif isinstance(value, str) and value and kind != 3:
        i = chance.randrange(len(value))
        owner[key] = value[:i] + chance.choice("0123abc./-") + value[i + chance.randrange(2) :]
    else:
        owner[key] = chance.choice(ODD)()
    return [path]


def damage_tensor(value: Tensor, chance: Chance) -> Any:
    return chance.choice(
        [
            lambda: value.to(chance.choice([torch.float16, torch.float64, torch.bfloat16, torch.int64, torch.int16])),
            lambda: value.reshape(-1),
            lambda: value.t() if value.dim() == 2 else value.unsqueeze(0),
            lambda: value.flatten()[:-1],
            lambda: value.expand(2, *value.shape),
            lambda: torch.full_like(value, chance.choice([math.nan, math.inf, -0.0, 7])) if value.is_floating_point()
            else torch.full_like(value, 7),
            lambda: value.clone().as_strided(value.shape, value.stride()),
            lambda: value.clone().requires_grad_() if value.is_floating_point() else value,
            lambda: value.flip(0) if value.dim() else value,
            lambda: value.to_sparse() if value.dim() else value.to("meta"),
            lambda: value.to("meta"),
            lambda: value.to(torch.complex64),
            lambda: value.tolist(),
            lambda: value.float().numpy(),
        ]
    )()  # fmt: skip


def damage_file(path: Path, chance: Chance) -> None:
    content = bytearray(path.read_bytes())
    at_, size = chance.randrange(len(content)), len(content)
    kind = chance.randrange(4)
    if kind == 0:
        content[at_] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del content[at_:]
    elif kind == 2:
        content += chance.randbytes(8)
    else:
        at_ = chance.randrange(8, min(size, 2500))  # names, shapes, metadata
        content[at_] = ord(chance.choice('0123456789abcdef"{}[],:.x'))
    path.write_bytes(bytes(content))


# --- What is right


def write_entries(kind: str, state: Any) -> tuple[Averager, dict[str, Tensor]]:
    """An Averager that holds what ``state`` says, written entry by entry, in this version's order of rules."""
    averager, live = make(kind, 0)
    meta, tensors = state["meta"], state["tensors"]
    averager.step, averager._buffers.seed = meta["step"], meta["seed"]
    averager._rules.last = {name: Tick(*(meta["last"][name][key] for key in Tick._fields)) for name in averager.rules}
    for i, name in enumerate(averager._rules.buffer_names()):
        for n, parameter in enumerate(averager._live.names):
            averager._buffers.buffers[i][n].copy_(tensors[f"{name}/{parameter}"].detach())
        if any(entry == f"{name}.low" for entries in meta["buffers"].values() for entry in entries) or any(
            key.startswith(f"{name}.low/") for key in tensors
        ):
            averager._buffers.keep_low(i)
            for n, parameter in enumerate(averager._live.names):
                bits = tensors.get(f"{name}.low/{parameter}")
                if bits is not None and averager._buffers.low[i]:
                    averager._buffers.low[i][n].copy_(bits)
    return averager, live


def read_all(averager: Averager) -> dict[str, Tensor]:
    return {
        f"{rule}/{name}": tensor
        for rule in averager.rules
        if averager.updates(rule)
        for name, tensor in averager.read(rule).items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in ((one[name], other[name]) for name in one)
    )


def try_case(kind: str, seed: int) -> tuple[str, str]:
    """``"refused"``, ``"right"``, or what is wrong; and a description."""
    chance = Chance(f"{kind} {seed}")
    steps = chance.randrange(4, 16)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        source, source_live = make(kind, steps)
        target, live = make(kind, 3)
        path = Path(folder, "averages.safetensors")
        if kind == "file":
            source.save(path)
            damage_file(path, chance)
            names, load = [str(path)], lambda: target.load(path)
            description, state = "damaged file", None
        else:
            state = copy.deepcopy(source.state_dict())
            places = damage(state, chance)
            names = [str(key) for place in places for key in place] + (["Averager"] if len(places[0]) == 1 else [])
            description, load = f"damage at {places}", lambda: target.load_state_dict(state)
        before = copy.deepcopy(target._state({}))
        for name, tensor in source_live.items():
            live[name].copy_(tensor)
        try:
            load()
        except ValueError as error:
            if not inside(error):
                return "raw", f"{description}: {traceback.format_exc()}"
            told = str(error)
            if not any(
                name.split("/")[0] in told for name in names if name not in ("meta", "tensors") or len(names) < 2
            ):
                return "does not name the entry", f"{description}: {told}"
            if target._state({})["meta"] != before["meta"] or not same(target._state({})["tensors"], before["tensors"]):
                return "changed by a refused load", f"{description}: {told}"
            return "refused", told
        except Exception:
            return "raw", f"{description}: {traceback.format_exc()}"
        try:
            return compare(kind, target, live, state or read_file(path), steps, description)
        except RuntimeError as error:  # digests of the live weights
            named = "are not those with which these averages were saved" in str(error) and inside(error)
            return ("refused" if named else "raw"), f"{description}: {error}"
        except Exception:
            return "raw at use", f"{description}: {traceback.format_exc()}"


def compare(
    kind: str, target: Averager, live: dict[str, Tensor], state: Any, steps: int, description: str
) -> tuple[str, str]:
    expected, twin = write_entries(kind, state)
    for name, tensor in live.items():
        twin[name].copy_(tensor)
    if not same(read_all(target), read_all(expected)):
        return "wrong", f"{description}: reads differ"
    for averager, tensors in ((target, live), (expected, twin)):
        follow(averager, tensors, range(steps + 1, steps + 6))
    if target.step != expected.step or not same(read_all(target), read_all(expected)):
        return "wrong", f"{description}: the run goes on differently"
    return "right", description


def inside(error: BaseException) -> bool:
    """Whether the error was raised by a line of lagless."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename.startswith(SOURCES)


def read_file(path: Path) -> Any:
    with safetensors.safe_open(path, "pt") as file:
        meta = json.loads((file.metadata() or {})["lagless"])
        return {"tensors": {name: file.get_tensor(name) for name in file.keys()}, "meta": meta}  # noqa: SIM118


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bad = 0
    for kind in [arguments.kind] if arguments.kind else KINDS:
        outcomes: Counter[str] = Counter()
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            outcome, description = try_case(kind, seed)
            outcomes[outcome] += 1
            if outcome not in ("right", "refused") or arguments.count == 1:
                print(f"{kind} --seed {seed}: {outcome}: {description}", flush=True)
        bad += sum(n for outcome, n in outcomes.items() if outcome not in ("right", "refused"))
        print(kind, dict(outcomes), flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
