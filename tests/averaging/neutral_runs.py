"""Runs that are interrupted and resumed, or followed by averages, are bit for bit those that are not.

    python -m tests.averaging.neutral_runs          # the whole table
    python -m tests.averaging.neutral_runs --list

Each configuration trains a small network with dropout and a momentum three times: without averages; with them; and with
them, stopped, saved and resumed in new objects. Live weights of all three are equal, and so are the averages of the
last two, and whatever the callbacks noted.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lagless import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    Averager,
    DecayAverage,
    PowerEMA,
    UniformAverage,
    WarmupAverage,
    WindowAverage,
)
from lagless.averaging import _buffers
from lagless.optim import PACE, PrimalAveraging, Pullback
from lagless.rules import Rule

STEPS, STOP = 9, 5

RULES: dict[str, Callable[[int], Mapping[str, Rule]]] = {
    "ema": lambda freq: {"ema": EMA(half_life_fraction=0.2, update_freq=freq)},
    "small gain": lambda freq: {"ema": EMA(decay=0.999, update_freq=freq)},
    "bema": lambda freq: {"bema": BEMA(update_freq=freq)},
    "bema paper": lambda freq: {"bema": BEMA.paper(update_after=1, update_freq=freq)},
    "ouema": lambda freq: {"ouema": OUEMA(update_freq=freq)},
    "dema": lambda freq: {"dema": DEMA(update_freq=freq)},
    "uniform": lambda freq: {"mean": UniformAverage(update_after=2, update_freq=freq)},
    "power": lambda freq: {"power": PowerEMA(relative_width=0.1, update_freq=freq)},
    "window": lambda freq: {"lawa": WindowAverage(window=2, update_freq=freq)},
    "decay": lambda freq: {"decay": DecayAverage(total_steps=STEPS, duration=0.6, update_freq=freq)},
    "warm-up": lambda freq: {"warm": WarmupAverage(update_freq=freq)},
    "several": lambda freq: {
        "bema": BEMA.paper(update_freq=freq), "ema": EMA(decay=0.8), "mean": UniformAverage(update_freq=2),
    },
}  # fmt: skip

STORAGES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16 averages": (torch.float32, torch.bfloat16),
    "bfloat16 weights": (torch.bfloat16, None),
    "float64 averages": (torch.float32, torch.float64),
}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "pace": lambda ps: PACE(ps, lr=0.01),
    "pullback": lambda ps: Pullback(torch.optim.AdamW(ps, lr=0.01), 0.3),
    "primal": lambda ps: PrimalAveraging(torch.optim.SGD(ps, lr=0.05), EMA(decay=0.8)),
}


@dataclass(frozen=True)
class Configuration:
    """One row of the table."""

    rules: str
    storage: str = "float32"
    offload: bool = False
    compile: bool = False
    update_freq: int = 1
    optimizer: str = "sgd"
    attach: bool = True
    use: str = "nothing"
    """What is done with the averages at every second step: nothing, "applied", "read", or "state"."""

    def __str__(self) -> str:
        extras = [name for name in ("offload", "compile") if getattr(self, name)]
        how = "attached" if self.attach else "update()"
        return ", ".join(
            [self.rules, self.storage, *extras, f"every {self.update_freq}", self.optimizer, how, self.use]
        )


def configurations() -> Iterator[Configuration]:
    """Yield the table: every rule in every storage, and the rest around them."""
    uses = itertools.cycle(("nothing", "applied", "read", "state"))
    optimizers, attach = itertools.cycle(OPTIMIZERS), itertools.cycle((True, False))
    for rules, storage in itertools.product(RULES, STORAGES):
        freq = 1 if storage in ("float32", "bfloat16 weights") else 2
        yield Configuration(
            rules, storage, update_freq=freq, optimizer=next(optimizers), attach=next(attach), use=next(uses)
        )
    for rules, storage in itertools.product(("bema", "small gain", "window", "several"), STORAGES):
        yield Configuration(rules, storage, offload=True, update_freq=2, use=next(uses))
        yield Configuration(rules, storage, offload=True, optimizer=next(optimizers), use=next(uses))
    for rules, freq in (("bema", 1), ("several", 1), ("several", 3), ("small gain", 1), ("uniform", 1)):
        yield Configuration(rules, compile=True, update_freq=freq, use=next(uses))
    for optimizer, use in itertools.product(OPTIMIZERS, ("applied", "read", "state")):
        yield Configuration("several", update_freq=3, optimizer=optimizer, use=use, attach=next(attach))


@dataclass
class Run:
    """What a run ends with."""

    weights: list[Tensor]
    averages: dict[str, Tensor] = field(default_factory=dict)
    noted: list[Tensor] = field(default_factory=list)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).to(dtype)


def train(c: Configuration, *, averaged: bool, stop: int | None, folder: Path) -> Run:
    """Train, with averages or without, and go on from a file in new objects after ``stop`` steps."""
    dtype, stored = STORAGES[c.storage]

    def begin() -> tuple[nn.Module, Any, Averager | None]:
        model = network(dtype)
        optimizer = OPTIMIZERS[c.optimizer](list(model.parameters()))
        options = {"dtype": stored, "compile": c.compile, "seed": 3, "device": "cpu" if c.offload else None}
        averager = Averager(model, RULES[c.rules](c.update_freq), **options) if averaged else None
        if averager is not None and c.attach:
            averager.attach(optimizer)
        return model, optimizer, averager

    model, optimizer, averager = begin()
    noted: list[Tensor] = []
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)  # dropout and data depend on the step alone
        data = torch.randn(5, 4).to(dtype)
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
        if averager is not None and not c.attach:
            averager.update()
        if averager is not None and step % 2 == 0:
            noted += note(c.use, averager, model)
        if step == stop and averager is not None:
            torch.save([model.state_dict(), optimizer.state_dict()], folder / "run.pt")
            averager.save(folder / "averages.safetensors")
            model, optimizer, averager = begin()
            weights, state = torch.load(folder / "run.pt", weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            assert averager is not None
            averager.load(folder / "averages.safetensors")
    averages = {} if averager is None else read_all(averager)
    return Run([p.detach().clone() for p in model.parameters()], averages, noted)


@torch.no_grad()
def note(use: str, averager: Averager, model: nn.Module) -> list[Tensor]:
    """Use the averages as a callback would."""
    found = []
    for name in averager.rules:
        if not averager.updates(name):
            continue
        if use == "applied":
            with averager.applied(name):
                model.eval()
                found.append(model(torch.ones(1, 4, dtype=next(model.parameters()).dtype)))
                model.train()
        elif use == "read":
            found += averager.read(name).values()
        elif use == "state":
            found += [tensor.clone() for tensor in averager.state_dict()["tensors"].values()]
    return found


def read_all(averager: Averager) -> dict[str, Tensor]:
    return {
        f"{rule}/{name}": tensor for rule in averager.rules for name, tensor in averager.read(rule).items()
    } | averager.state_dict()["tensors"]


@contextmanager
def environment(c: Configuration) -> Iterator[None]:
    """Offloading happens from CPUs too, and compiled updates take small tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mock.patch.object(_buffers, "can_overlap", lambda device: c.offload), mock.patch.object(
            _buffers, "KERNEL_SMALLEST", 1 if c.compile else _buffers.KERNEL_SMALLEST
        ):  # fmt: skip
            yield


def differences(c: Configuration) -> list[str]:
    """What differs between the runs of a configuration; nothing should."""
    with environment(c), tempfile.TemporaryDirectory() as folder:
        bare = train(c, averaged=False, stop=None, folder=Path(folder))
        whole = train(c, averaged=True, stop=None, folder=Path(folder))
        resumed = train(c, averaged=True, stop=STOP, folder=Path(folder))
    found = []
    if not equal(bare.weights, whole.weights):
        found.append("live weights with and without averages")
    if not equal(whole.weights, resumed.weights):
        found.append("live weights of the resumed run")
    if whole.averages.keys() != resumed.averages.keys() or not equal(
        [*whole.averages.values()], [resumed.averages[name] for name in whole.averages]
    ):
        found.append("averages of the resumed run")
    if not equal(whole.noted, resumed.noted):
        found.append("what was read on the way")
    return found


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    table, bad = list(configurations()), 0
    listing = parser.parse_args().list
    for c in table:
        found = [] if listing else differences(c)
        bad += bool(found)
        if listing or found:
            print(f"{c}{': ' + '; '.join(found) if found else ''}", flush=True)
    if not listing:
        print(f"{len(table)} configurations, {bad} with differences")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
