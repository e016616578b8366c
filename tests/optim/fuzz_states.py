"""Damage the states of optimizers at random: each is refused with a message, or does what it says.

    python -m tests.optim.fuzz_states 1000                          # cases of each kind of optimizer
    python -m tests.optim.fuzz_states 1 --kind pace --seed 77       # one case again

Every case loads a damaged state into an optimizer that has stepped, in a process of its own. A refusal must be
lagless's own, name the entry, and leave the optimizer as it was. After a load, steps must equal those of another
optimizer, which was made with the settings of the damaged state, and whose state was assigned entry by entry.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.forked_cases import in_child
from torch import Tensor, nn

import lagless
from lagless.optim import (
    PACE,
    BiasCorrectedAdamW,
    BiasCorrectedShampoo,
    BiasCorrectedSophia,
    PrimalAveraging,
    Pullback,
    sampled_label_loss,
)
from lagless.rules import rule_from_dict, rule_to_dict

Chance = random.Random
Parameters = list[tuple[str, nn.Parameter]]
SOURCES = str(Path(lagless.__file__).parent)
SHAPES = {"a": (6, 4), "b": (6, 4), "c": (5,), "d": (3, 5), "e": ()}
SECONDS = 60  # for one case
CONSTANT = lagless.EMA(decay=0.9)


def _adamw(parameters: Parameters, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [p for _, p in parameters]}], lr=0.02, **settings)


MAKERS: dict[str, Callable[[Parameters], Any]] = {
    "pace": lambda p: PACE(p, lr=0.02),
    "pace-compile": lambda p: PACE(p, lr=0.02, compile=True, average=CONSTANT),
    "pace-bema": lambda p: PACE(p, lr=0.02, average=lagless.BEMA(update_freq=2), average_dtype=torch.bfloat16),
    "pace-capturable": lambda p: PACE(p, lr=0.02, capturable=True, average=CONSTANT),
    "pullback-adamw": lambda p: Pullback(_adamw(p, amsgrad=True), average=CONSTANT),
    "pullback-sgd": lambda p: Pullback(
        torch.optim.SGD(p, lr=0.02, momentum=0.9), average=lagless.WindowAverage(window=4)
    ),
    "primal-adamw": lambda p: PrimalAveraging(_adamw(p), CONSTANT),
    "primal-rmsprop": lambda p: PrimalAveraging(
        torch.optim.RMSprop(p, lr=0.02), lagless.DEMA(), interpolation=0.3, pull=0.1
    ),
    "primal-bias": lambda p: PrimalAveraging(BiasCorrectedAdamW(p, lr=0.02, report_freq=0), CONSTANT),
    "adamw": lambda p: BiasCorrectedAdamW(p, lr=0.02, warm_start=2),
    "adamw-compile": lambda p: BiasCorrectedAdamW(p, lr=0.02, warm_start=2, compile=True, report_freq=0),
    "sophia": lambda p: BiasCorrectedSophia(p, lr=0.02, hessian_freq=2),
    "shampoo": lambda p: BiasCorrectedShampoo(p, lr=0.02, root_freq=2, inverse_correction="post_ema", block_size=4),
    "shampoo-compile": lambda p: BiasCorrectedShampoo(p, lr=0.02, grafting="none", compile=True),
}
NARROW = ("pace", "pullback-adamw", "primal-adamw", "adamw")  # tried with parameters of bfloat16, too


# --- Optimizers, and steps that are the same at every run


class Run:
    """Parameters and an optimizer of one kind."""

    def __init__(self, kind: str, *, narrow: bool = False, weights: dict[str, Tensor] | None = None) -> None:
        dtype = torch.bfloat16 if narrow else torch.float32
        generator = torch.Generator().manual_seed(1)
        self.parameters = [
            (name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype))) for name, shape in SHAPES.items()
        ]
        if weights is not None:
            with torch.no_grad():
                for name, parameter in self.parameters:
                    parameter.copy_(weights[name])
        self.optimizer = MAKERS[kind](self.parameters)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters}

    def run(self, first: int, count: int) -> Run:
        for step in range(first, first + count):
            self.optimizer.zero_grad()
            for microbatch in range(2):
                generator = torch.Generator().manual_seed(100 * step + microbatch)
                noise = {n: torch.randn(p.shape, generator=generator) for n, p in self.parameters}
                if isinstance(self.optimizer, BiasCorrectedSophia) and self.optimizer.curvature_due:
                    logits = (
                        torch.stack([(p.float() * noise[n]).sum() for n, p in self.parameters])
                        .expand(3, -1)
                        .nan_to_num()
                    )
                    torch.manual_seed(step)
                    self.optimizer.add_curvature(sampled_label_loss(logits[None], torch.zeros(1, 3, dtype=torch.long)))
                sum(((p.float() - 0.3 * noise[n]) ** 2).sum() for n, p in self.parameters).backward()  # pyright: ignore
            self.optimizer.step()
        return self

    def results(self) -> dict[str, Tensor]:
        """Weights and averages."""
        found = self.weights()
        if hasattr(self.optimizer, "read"):
            try:
                found |= {f"average {name}": value for name, value in self.optimizer.read().items()}
            except RuntimeError as error:
                assert "there is no average yet" in str(error)
        return found


# --- Damage

ODD: list[Any] = [None, True, -1, 0, 3, 2.5, -0.5, 1e300, 10**400, float("nan"), float("inf"), "", "x", [], {}, (1, 2)]
SETTINGS: list[Any] = [*ODD, 0.1, 0.5, (0.5, 0.6), [0.5, 0.6], (0.9, 1.0), (0.9,), (-0.1, 0.9), torch.tensor(0.3)]
RULES: list[Any] = [
    lagless.EMA(decay=0.5),
    lagless.BEMA(),
    lagless.UniformAverage(),
    lagless.WindowAverage(window=3),
    lagless.EMA(half_life_fraction=0.1),
]


def _in_other_memory(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else torch.stack([tensor, tensor], -1)[..., 0]


TENSORS: dict[str, Callable[[Tensor, Chance], Any]] = {
    "none": lambda t, _: None,
    "list": lambda t, _: t.tolist(),
    "number": lambda t, _: 0.5,
    "int": lambda t, _: t.long(),
    "bool": lambda t, _: t > 0,
    "complex": lambda t, _: t.to(torch.complex64),
    "float64": lambda t, _: t.double(),
    "float16": lambda t, _: t.half(),
    "bfloat16": lambda t, _: t.bfloat16(),
    "float8": lambda t, _: t.to(torch.float8_e4m3fn),
    "sparse": lambda t, _: t.to_sparse(),
    "meta": lambda t, _: t.to("meta"),
    "grad": lambda t, _: t.clone().requires_grad_(t.is_floating_point()),
    "transposed": lambda t, _: t.mT.clone() if t.dim() > 1 else t[..., None],
    "memory": lambda t, _: _in_other_memory(t),
    "expanded": lambda t, _: t.reshape(-1)[:1].reshape([1] * t.dim()).expand(t.shape),
    "scalar": lambda t, _: t.sum(),
    "empty": lambda t, _: t.new_empty(0),
    "shorter": lambda t, _: t[:-1].clone() if t.dim() else t[None],
    "longer": lambda t, _: torch.cat([t, t[:1]]) if t.dim() else torch.stack([t, t]),
    "flat": lambda t, _: t.flatten(),
    "nan": lambda t, _: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    "inf": lambda t, _: torch.full_like(t, float("inf")) if t.is_floating_point() else t,
    "negative": lambda t, _: -t - 1,
    "huge": lambda t, _: t.float() * 1e30,
    "tiny": lambda t, _: t.float() * 1e-40,
    "fraction": lambda t, _: t + 0.5,
    "late": lambda t, _: t + 10**6,
}


def damage(state: dict[str, Any], chance: Chance) -> list[str]:
    """Change one thing in ``state``, in place. Returns names one of which an error must mention."""
    states, groups = state["state"], state["param_groups"]
    kind = chance.randrange(20)
    if kind < 9:
        number = chance.choice(list(states))
        return _damage_entry(states, number, chance.choice(list(states[number])), chance)
    if kind < 15:
        index = chance.randrange(len(groups))
        return _damage_setting(groups, index, chance.choice(list(groups[index])), chance)
    if kind < 17:
        return _exchange(states, chance)
    return _damage_structure(state, chance)


def _damage_entry(states: dict[Any, Any], number: Any, name: str, chance: Chance) -> list[str]:
    value, kind = states[number][name], chance.randrange(8)
    if kind == 0:
        del states[number][name]
    elif kind == 1:
        new = chance.choice([name + "_", "live", "average", "average_0", "z", "step"])
        states[number][new] = states[number].pop(name)
        return [name, new]
    elif kind == 2:
        states[number][name] = chance.choice(ODD)
    elif isinstance(value, Tensor):
        states[number][name] = TENSORS[chance.choice(list(TENSORS))](value, chance)
    else:
        states[number][name] = chance.choice(
            [value, -1, 0, value + 0.5, value + 10**6, 2**70, torch.tensor(value), "3"]
        )
    # Which entries there must be follows from this one.
    return [name, "average"] if name == "interpolation" else [name]


def _damage_setting(groups: list[Any], index: int, name: str, chance: Chance) -> list[str]:
    group = groups[index]
    if name == "average" and chance.random() < 0.7:
        if chance.random() < 0.5:
            group[name] = rule_to_dict(chance.choice(RULES))
            return ["average", "lacks"]
        rule = group[name] = dict(group[name])
        part = chance.choice(list(rule))
        rule[part] = chance.choice(SETTINGS)
        return ["average", str(part), str(rule.get("rule")), "averag"]
    if name == "params" and chance.random() < 0.7:
        params = group["params"] = list(group["params"])
        chance.choice([params.reverse, params.pop, lambda: params.append(99), lambda: params.append(params[0])])()
        return ["param"]
    if name == "param_names" and chance.random() < 0.7:
        names = group["param_names"] = list(group["param_names"])
        chance.choice([names.reverse, names.pop, lambda: names.append("z"), lambda: names.__setitem__(0, 3)])()
        return ["param_names"]
    if chance.random() < 0.25:
        del group[name]
    elif chance.random() < 0.1:
        group[name + "_"] = group.pop(name)
    else:
        group[name] = chance.choice(SETTINGS)
    # Rules and torch's optimizers call some arguments otherwise.
    others = {"lr": ["learning rate"], "eps": ["epsilon"], "betas": ["beta"], "params": ["param"]}
    return [name, *others.get(name, [])]


def _exchange(states: dict[Any, Any], chance: Chance) -> list[str]:
    one, other = (chance.choice(list(states)) for _ in range(2))
    kind, names = chance.randrange(4), [*states[one]]
    if kind == 0:
        states[one], states[other] = states[other], states[one]
    elif kind == 1:
        states[one] = states[other]  # the same tensors twice
    elif kind == 2:
        first, second = chance.choice(names), chance.choice(names)
        states[one][first], states[one][second] = states[one][second], states[one][first]
    else:
        first, second = chance.choice(names), chance.choice(names)
        states[one][first] = states[one][second]
    return ["parameter"]


def _damage_structure(state: dict[str, Any], chance: Chance) -> list[str]:
    key, kind = chance.choice(list(state)), chance.randrange(7)
    states = state["state"]
    number = chance.choice(list(states))
    if kind == 0:
        del state[key]
    elif kind == 1:
        state[key] = chance.choice(ODD)
    elif kind == 2:
        state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))
        key = "param_groups"
    elif kind == 3:
        del states[number]
    elif kind == 4:
        states[number] = chance.choice(ODD)
        key = "state"
    elif kind == 5:
        states[chance.choice([99, str(number), -1, None])] = states.pop(number)
        key = "state"
    else:
        states[number] = {}
    return [key, "param"]


# --- What a damaged state means


def meaning(kind: str, state: dict[str, Any], like: Run, narrow: bool) -> Run:
    """Return a run of the settings in ``state``, with its entries assigned one by one."""
    defaults = [{k: v for k, v in g.items() if k != "params"} for g in MAKERS[kind](like.parameters).param_groups]
    expected = Run(kind, narrow=narrow, weights=like.weights())
    optimizer, evaluating = expected.optimizer, any(group.get("evaluating") for group in state["param_groups"])
    groups = [{**own, **given} for own, given in zip(defaults, state["param_groups"], strict=True)]
    for group, own, numbers in zip(groups, optimizer.param_groups, state["param_groups"], strict=True):
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names", "evaluating")}
        rule = settings.get("average")
        if isinstance(rule, dict):
            settings["average"] = rule_from_dict(rule)
        if "compile" in settings and isinstance(settings["compile"], bool):
            settings["compile"] = False  # single operations
        _construct(optimizer, settings)
        own.update(settings)
        for number, parameter in zip(numbers["params"], own["params"], strict=True):
            entries = state["state"].get(number)
            if entries:
                taken = optimizer.state[parameter] = {k: _taken(k, v, like) for k, v in entries.items()}
                if evaluating and "live" in taken:
                    parameter.data = taken.pop("live").to(parameter.dtype)
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    return expected


def _construct(optimizer: Any, settings: dict[str, Any]) -> None:
    """Make an optimizer of the same class with ``settings``: it must not be one that the constructor refuses."""
    parameter = [("w", nn.Parameter(torch.zeros(2, 2)))]
    base = getattr(optimizer, "optimizer", None)
    kind = type(base if base is not None else optimizer)
    made: Any = kind(parameter, **_arguments(kind, settings))
    if base is not None:
        type(optimizer)(made, **_arguments(type(optimizer), settings))


def _arguments(kind: type[Any], settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k in inspect.signature(kind).parameters}


def _taken(name: str, value: Any, like: Run) -> Any:
    if name in ("step", "average_step"):
        count = float(value)
        return int(count) if name == "average_step" else torch.tensor(count, dtype=torch.float64)
    if not isinstance(value, Tensor):
        return value
    held = next((s[name] for s in like.optimizer.state.values() if name in s), None)
    averages = name.startswith("average") and value.dtype in (torch.float32, torch.float64, torch.bfloat16)
    dtype = value.dtype if averages or held is None else held.dtype
    return value.detach().to(dtype).clone(memory_format=torch.contiguous_format)


# --- A case


def try_case(kind: str, seed: int) -> tuple[str, str]:
    """Run one case in a child process. Returns its outcome: right, refused, wrong, raw or crash, and details."""
    return in_child(lambda: _case(kind, seed), SECONDS)


def _case(kind: str, seed: int) -> tuple[str, str]:
    warnings.simplefilter("ignore")
    chance = Chance(f"{kind} {seed}")
    narrow = kind in NARROW and chance.random() < 0.3
    saved = Run(kind, narrow=narrow).run(0, 3)
    evaluating = hasattr(saved.optimizer, "eval") and chance.random() < 0.15
    if evaluating:
        saved.optimizer.eval()
    state = copy.deepcopy(saved.optimizer.state_dict())
    if evaluating:
        saved.optimizer.train()
    names = damage(state, chance)
    run = Run(kind, narrow=narrow, weights=saved.weights())
    if chance.random() < 0.7:
        run.run(5, 1)
        with torch.no_grad():
            for name, parameter in run.parameters:
                parameter.copy_(saved.weights()[name])
    before, twin = _snapshot(run), copy.deepcopy(run)
    shared = copy.deepcopy(state)
    try:
        run.optimizer.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not frames[-1].filename.startswith(SOURCES):
            return "raw", traceback.format_exc()
        if not any(name in str(error) for name in names):
            return "raw", f"none of {names} is named: {error}"
        if not _same(before, _snapshot(run)):
            return "wrong", f"a refused load has changed the optimizer: {error}"
        same = _compare(run.run(5, 1).results(), twin.run(5, 1).results(), 0.0)
        return ("wrong", f"after a refused load: {same}") if same else ("refused", str(error))
    if hasattr(run.optimizer, "train"):
        run.optimizer.train()
    try:
        expected = meaning(kind, shared, saved, narrow)
    except Exception:
        return "wrong", f"accepted {names}, but: {traceback.format_exc()}"
    for _ in range(2):
        difference = _compare(run.results(), expected.results(), 2.0**-6 if narrow or kind == "pace-bema" else 2e-5)
        if difference:
            return "wrong", f"{names}: {difference}"
        run.run(3, 2)
        try:
            expected.run(3, 2)
        except Exception:
            return "wrong", f"accepted {names}, but: {traceback.format_exc()}"
    return "right", ""


def _snapshot(run: Run) -> Any:
    return copy.deepcopy((run.weights(), run.optimizer.state_dict()))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> str:
    if found.keys() != expected.keys():
        return f"{sorted(found)} instead of {sorted(expected)}"
    for name, tensor in found.items():
        wanted = expected[name]
        if tensor.dtype != wanted.dtype and not name.startswith("average"):
            return f"{name} is {tensor.dtype} instead of {wanted.dtype}"
        scale = float(wanted.double().abs().nan_to_num(0.0, 0.0, 0.0).max()) + 1.0
        close = torch.isclose(tensor.double(), wanted.double(), tolerance, tolerance * scale, equal_nan=True)
        if tensor.shape != wanted.shape or not bool(close.all()):
            return f"{name} is {tensor.tolist()} instead of {wanted.tolist()}"
    return ""


def prepare() -> None:
    """Compile what cases need, once for all children, and see that without damage all is right."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for kind in MAKERS:
        saved = Run(kind).run(0, 3)
        run = Run(kind, weights=saved.weights())
        run.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
        expected = meaning(kind, copy.deepcopy(saved.optimizer.state_dict()), saved, False)
        for each in (run, expected):
            difference = _compare(each.run(3, 2).results(), copy.deepcopy(saved).run(3, 2).results(), 2e-5)
            assert not difference, f"{kind}: {difference}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="cases of each kind")
    parser.add_argument("--kind", choices=MAKERS, action="append")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args()
    prepare()
    failed = 0
    for kind in options.kind or MAKERS:
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
