"""Does the pull of PACE help? Against AdamW with an EMA, with falling learning rates, and with the pull always clamped.

Two small problems, many seeds at once (every operation is per element or per seed). A method's settings are chosen on
some seeds and its loss reported on others. Run: ``python benchmarks/pace_quality.py``, some minutes on two cores.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from _harness import report
from torch import Tensor, nn

from lagless import EMA
from lagless.optim import PACE

SEEDS = 16  # for choosing settings; as many again, and others, for the report
CLAMPED = 1e12  # a pullback that clamps every gain


class Problem(NamedTuple):
    """Parameters with a leading dimension of seeds, their training loss at a step, and the loss that is reported."""

    parameters: list[nn.Parameter]
    loss: Callable[[int], Tensor]
    report: Callable[[list[Tensor]], Tensor]
    steps: int
    rates: list[float]


def quadratic(first_seed: int) -> Problem:
    """½ Σ a_i θ_i² in 100 dimensions, a from 1e-3 to 1, from θ = 1, with unit noise on every gradient."""
    curvature = torch.logspace(-3, 0, 100)
    generator = torch.Generator().manual_seed(first_seed)
    theta = nn.Parameter(torch.ones(SEEDS, 100))

    def loss(step: int) -> Tensor:
        noise = torch.randn(theta.shape, generator=generator)
        return (0.5 * curvature * theta.square() + noise * theta).sum()

    def report(values: list[Tensor]) -> Tensor:
        return (0.5 * curvature * values[0].square()).sum(1)

    return Problem([theta], loss, report, 500, [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0])


def language_model(first_seed: int) -> Problem:
    """A network with one hidden layer that predicts the next of 12 symbols of a random second-order Markov chain."""
    generator = torch.Generator().manual_seed(first_seed)
    symbols, width, hidden, batch = 12, 6, 24, 8
    chain = torch.softmax(2.0 * torch.randn(symbols, symbols, symbols, generator=torch.Generator().manual_seed(0)), -1)
    shapes = (symbols, width), (2 * width, hidden), (hidden, symbols)
    parameters = [
        nn.Parameter(torch.randn(SEEDS, *shape, generator=generator) / math.sqrt(shape[0])) for shape in shapes
    ]
    everything = torch.cartesian_prod(torch.arange(symbols), torch.arange(symbols)).expand(SEEDS, -1, -1)

    def predict(values: list[Tensor], context: Tensor) -> Tensor:
        table, into, out = values
        embedded = table[torch.arange(SEEDS)[:, None, None], context].flatten(2)
        return torch.log_softmax(torch.tanh(embedded @ into) @ out, -1)

    def loss(step: int) -> Tensor:
        context = torch.randint(0, symbols, (SEEDS, batch, 2), generator=generator)
        law = chain[context[..., 0], context[..., 1]].flatten(0, 1)
        target = torch.multinomial(law, 1, generator=generator).view(SEEDS, batch, 1)
        return -predict(parameters, context).gather(2, target).mean((1, 2)).sum()

    def report(values: list[Tensor]) -> Tensor:
        law = chain.view(1, -1, symbols)
        return (law * (law.log() - predict(values, everything))).sum(2).mean(1)  # excess over the entropy

    return Problem(parameters, loss, report, 500, [1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0])


class Setting(NamedTuple):
    """One run: c, κ, learning rate and its schedule, and whether the average or the last iterate is reported."""

    pullback: float
    power: float
    lr: float
    schedule: str
    averaged: bool


POWERS = (0.2, 0.5, 0.7, 1.0)


def grid(method: str, rates: list[float]) -> Iterator[Setting]:
    """The settings of a method: four per learning rate; five times as many for PACE, which has one parameter more."""
    fine = [r * s for r in rates for s in (0.5, 0.7, 1.0, 1.4)]
    if method in ("AdamW, constant", "AdamW, cosine"):
        yield from (Setting(0.0, 0.5, rate, method.split()[1], False) for rate in fine)
        return
    for rate, power in itertools.product(rates, POWERS):
        if method == "AdamW, η(1+t)^-κ":
            yield Setting(0.0, power, rate, "power", False)
        elif method == "AdamW + EMA":
            yield Setting(0.0, power, rate, "constant", True)
        elif method == "always clamped":
            yield Setting(CLAMPED, power, rate, "constant", True)
        else:
            yield from (Setting(c, power, rate, "constant", True) for c in (0.03, 0.3, 3.0, 30.0, 300.0))


def run(problem: Problem, setting: Setting) -> tuple[Tensor, float]:
    """Reported loss of each seed, and the fraction of gains that was clamped in the last tenth of the run."""
    average = EMA(ema_power=setting.power, lag=1.0, min_ema_multiplier=1e-4)
    settings = {"lr": setting.lr, "pullback": setting.pullback, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    optimizer = PACE(problem.parameters, average=average, **settings)
    clipped = 0.0
    for step in range(1, problem.steps + 1):
        if setting.schedule == "cosine":
            optimizer.param_groups[0]["lr"] = setting.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / problem.steps))
        elif setting.schedule == "power":
            optimizer.param_groups[0]["lr"] = setting.lr * (1 + step) ** -setting.power
        optimizer.zero_grad()
        problem.loss(step).backward()
        if step == problem.steps and setting.pullback > 0.0:
            with optimizer.recording() as statistics:
                optimizer.step()
            clipped = statistics.read()["fraction_clipped"]
        else:
            optimizer.step()
    with torch.no_grad():
        values = list(optimizer.read().values()) if setting.averaged else [p.detach() for p in problem.parameters]
        return problem.report(values), clipped


METHODS = ("AdamW, constant", "AdamW, cosine", "AdamW, η(1+t)^-κ", "AdamW + EMA", "always clamped", "PACE")


def main() -> None:
    began = time.time()
    record: dict[str, object] = {"seeds": SEEDS}
    for make in (quadratic, language_model):
        rows = {}
        print(f"\n{make.__name__}: {make.__doc__}")
        for method in METHODS:
            chosen = {s: run(make(1), s)[0].mean().item() for s in grid(method, make(1).rates)}
            best = min(chosen, key=lambda s: chosen[s] if math.isfinite(chosen[s]) else math.inf)
            losses, clipped = run(make(2), best)
            mean, error = losses.mean().item(), losses.std().item() / SEEDS**0.5
            rows[method] = {"loss": mean, "standard_error": error, "clipped": clipped} | best._asdict()
            print(
                f"  {method:18s} {mean:.5f} ± {error:.5f}   lr {best.lr:g}, κ {best.power:g}, c {best.pullback:g}, "
                f"clamped {clipped:.0%}",
                flush=True,
            )
        # What c does at the learning rate and power of the best AdamW + EMA.
        start = rows["AdamW + EMA"]
        sweep = {}
        for c in (0.0, 0.03, 0.3, 3.0, 30.0, 300.0, CLAMPED):
            losses, clipped = run(make(2), Setting(c, start["power"], start["lr"], "constant", True))
            sweep[f"{c:g}"] = {"loss": losses.mean().item(), "clipped": clipped}
            print(
                f"    c {c:<8g} at lr {start['lr']:g}, κ {start['power']:g}: {losses.mean():.5f}, clamped {clipped:.0%}"
            )
        record[make.__name__] = {"methods": rows, "pullback_at_the_settings_of_the_ema": sweep}
    record["seconds"] = round(time.time() - began)
    report("pace-quality", record, {})


if __name__ == "__main__":
    main()
