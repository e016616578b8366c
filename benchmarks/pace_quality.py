"""Does the pull of PACE help? Against AdamW with an EMA, with falling learning rates, and with the pull always clamped.

Two small problems, many seeds at once (every operation is per element or per seed). A method's settings are chosen on
some seeds, on a coarse grid and then on a fine one around its own best, with the same spacing for every method; its
loss is reported on other seeds, the same ones for every method, so that differences are paired.

Run: ``python benchmarks/pace_quality.py``, some minutes on one core.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from _harness import report
from torch import Tensor, nn

from lagless import EMA
from lagless.optim import PACE

CHOOSING, REPORTING = 16, 64  # seeds
CLAMPED = 1e12  # a pullback that clamps every gain


class Problem(NamedTuple):
    """Parameters with a leading dimension of seeds, their training loss at a step, and the loss that is reported."""

    parameters: Sequence[nn.Parameter]
    loss: Callable[[int], Tensor]
    report: Callable[[Sequence[Tensor]], Tensor]
    steps: int = 500


def quadratic(seed: int, seeds: int) -> Problem:
    """½ Σ a_i θ_i² in 100 dimensions, a from 1e-3 to 1, from θ = 1, with unit noise on every gradient."""
    curvature = torch.logspace(-3, 0, 100)
    generator = torch.Generator().manual_seed(seed)
    theta = nn.Parameter(torch.ones(seeds, 100))

    def loss(step: int) -> Tensor:
        noise = torch.randn(theta.shape, generator=generator)
        return (0.5 * curvature * theta.square() + noise * theta).sum()

    def report(values: Sequence[Tensor]) -> Tensor:
        return (0.5 * curvature * values[0].square()).sum(1)

    return Problem([theta], loss, report)


def language_model(seed: int, seeds: int) -> Problem:
    """A network with one hidden layer that predicts the next of 12 symbols of a random second-order Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    symbols, width, hidden, batch = 12, 6, 24, 8
    chain = torch.softmax(2.0 * torch.randn(symbols, symbols, symbols, generator=torch.Generator().manual_seed(0)), -1)
    shapes = (symbols, width), (2 * width, hidden), (hidden, symbols)
    parameters = [
        nn.Parameter(torch.randn(seeds, *shape, generator=generator) / math.sqrt(shape[0])) for shape in shapes
    ]
    everything = torch.cartesian_prod(torch.arange(symbols), torch.arange(symbols)).expand(seeds, -1, -1)

    def predict(values: Sequence[Tensor], context: Tensor) -> Tensor:
        table, into, out = values
        embedded = table[torch.arange(seeds)[:, None, None], context].flatten(2)
        return torch.log_softmax(torch.tanh(embedded @ into) @ out, -1)

    def loss(step: int) -> Tensor:
        context = torch.randint(0, symbols, (seeds, batch, 2), generator=generator)
        law = chain[context[..., 0], context[..., 1]].flatten(0, 1)
        target = torch.multinomial(law, 1, generator=generator).view(seeds, batch, 1)
        return -predict(parameters, context).gather(2, target).mean((1, 2)).sum()

    def report(values: Sequence[Tensor]) -> Tensor:
        law = chain.view(1, -1, symbols)
        return (law * (law.log() - predict(values, everything))).sum(2).mean(1)  # excess over the entropy

    return Problem(parameters, loss, report)


SCHEDULES: dict[str, Callable[[int, int, float], float]] = {
    "constant": lambda step, steps, kappa: 1.0,
    "cosine": lambda step, steps, kappa: 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)),
    "linear": lambda step, steps, kappa: 1 - (step - 1) / steps,
    "power": lambda step, steps, kappa: (1 + step) ** -kappa,
}


class Method(NamedTuple):
    """How AdamW is used: the schedule of its learning rate, what is returned, what is pulled how strongly.

    ``powers`` is whether κ matters, ``pull`` the c; None for one to be chosen.
    """

    schedule: str
    averaged: bool
    powers: bool
    pull: float | None


METHODS = {
    "AdamW, constant": Method("constant", False, False, 0.0),
    "AdamW, cosine": Method("cosine", False, False, 0.0),
    "AdamW, linear": Method("linear", False, False, 0.0),
    "AdamW, η(1+t)^-κ": Method("power", False, True, 0.0),
    "AdamW + EMA": Method("constant", True, True, 0.0),
    "AdamW, cosine + EMA": Method("cosine", True, True, 0.0),
    "always clamped": Method("constant", True, True, CLAMPED),
    "PACE": Method("constant", True, True, None),
}


class Setting(NamedTuple):
    """A place on the grid: η = 0.01 · 1.2^rate, κ = power/10, c = 10^(pull/2)."""

    rate: int
    power: int
    pull: int

    @property
    def lr(self) -> float:
        return 0.01 * 1.2**self.rate

    @property
    def kappa(self) -> float:
        return self.power / 10

    @property
    def c(self) -> float:
        return 10 ** (self.pull / 2)


# κ = 1 is the slowest average there is; from c = 1e-2 down nothing is clamped, from c = 1e3 on everything.
LIMITS = Setting(10**6, 10, 6), Setting(-(10**6), 0, -4)


def coarse(method: Method) -> list[Setting]:
    """Learning rates from 3e-3 to 2 in steps of 1.44, as good ones form narrow valleys; powers of 0.3, c of 30."""
    powers = range(2, 9, 3) if method.powers else [5]
    pulls = range(-2, 5, 3) if method.pull is None else [0]
    return [Setting(*place) for place in itertools.product(range(-6, 29, 2), powers, pulls)]


def around(center: Setting, method: Method) -> list[Setting]:
    """Learning rates in steps of 1.2 to the coarse neighbours, powers of 0.1, c of √10."""
    widths = 2, int(method.powers), int(method.pull is None)
    ranges = [
        range(max(x - width, low), min(x + width, high) + 1)
        for x, width, low, high in zip(center, widths, LIMITS[1], LIMITS[0], strict=True)
    ]
    return [Setting(*place) for place in itertools.product(*ranges)]


def best(loss: Callable[[Setting], float], method: Method, moves: int = 20) -> tuple[Setting, int]:
    """The best setting on the fine grid around it, and how many settings were tried.

    A best one at an edge becomes the center of the next grid, so that the result has neighbours on every side that
    are worse, or is at a limit.

    Raises:
        RuntimeError: if there is none after so many ``moves``.
    """
    losses: dict[Setting, float] = {}

    def lowest(settings: list[Setting]) -> Setting:
        for setting in settings:
            if setting not in losses:
                value = loss(setting)
                losses[setting] = value if math.isfinite(value) else math.inf
        return min(settings, key=losses.__getitem__)

    center = lowest(coarse(method))
    for _ in range(moves):
        found = lowest(around(center, method))
        inside = abs(found.rate - center.rate) < 2
        inside &= found.power == center.power or found.power in (LIMITS[0].power, LIMITS[1].power)
        inside &= found.pull == center.pull or found.pull in (LIMITS[0].pull, LIMITS[1].pull)
        if inside:
            return found, len(losses)
        center = found
    raise RuntimeError(f"after {moves} moves the best setting, {center}, is still at an edge of its grid")


def run(problem: Problem, method: Method, setting: Setting, c: float | None = None) -> tuple[Tensor, float]:
    """Reported loss of each seed, and the fraction of gains that was clamped at the last step."""
    c = next(value for value in (c, method.pull, setting.c) if value is not None)
    average = EMA(ema_power=setting.kappa, lag=1.0, min_ema_multiplier=1e-4)
    settings = {"lr": setting.lr, "pullback": c, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    optimizer = PACE(problem.parameters, average=average, **settings)
    clipped = 0.0
    for step in range(1, problem.steps + 1):
        optimizer.param_groups[0]["lr"] = setting.lr * SCHEDULES[method.schedule](step, problem.steps, setting.kappa)
        optimizer.zero_grad()
        problem.loss(step).backward()
        if step == problem.steps and c > 0.0:
            with optimizer.recording() as statistics:
                optimizer.step()
            clipped = statistics.read()["fraction_clipped"]
        else:
            optimizer.step()
    with torch.no_grad():
        values = list(optimizer.read().values()) if method.averaged else [p.detach() for p in problem.parameters]
        return problem.report(values), clipped


def mean_and_error(losses: Tensor) -> dict[str, float]:
    """Mean over seeds, and its standard error."""
    return {"mean": losses.mean().item(), "standard_error": losses.std().item() / len(losses) ** 0.5}


def compare(make: Callable[[int, int], Problem]) -> dict[str, object]:
    """All methods on one problem: losses, paired differences, and what c does to the best AdamW + EMA."""
    rows, losses, chosen = {}, {}, {}
    for name, method in METHODS.items():
        chosen[name], tried = best(lambda s, m=method: run(make(1, CHOOSING), m, s)[0].mean().item(), method)
        losses[name], clipped = run(make(2, REPORTING), method, chosen[name])
        rows[name] = mean_and_error(losses[name]) | {"clipped": clipped, "lr": chosen[name].lr, "tried": tried}
        if method.powers:
            rows[name]["kappa"] = chosen[name].kappa
        if method.pull is None:
            rows[name]["c"] = chosen[name].c
        print(f"  {name:20s}", "  ".join(f"{k} {v:.4g}" for k, v in rows[name].items()), flush=True)
    paired = {
        f"{name} - {other}": mean_and_error(losses[name] - losses[other])
        for name in ("PACE", "always clamped")
        for other in METHODS
        if other != name
    }
    sweep = {}
    for c in (0.03, 0.3, 3.0, 30.0, 300.0, CLAMPED):
        start = chosen["AdamW + EMA"]
        pulled, clipped = run(make(2, REPORTING), METHODS["AdamW + EMA"], start, c)
        sweep[f"{c:g}"] = mean_and_error(pulled - losses["AdamW + EMA"]) | {"clipped": clipped}
    for label, difference in (paired | {f"c = {c} at the EMA's settings": x for c, x in sweep.items()}).items():
        print(f"    {label:40s} {difference['mean']:+.4f} ± {difference['standard_error']:.4f}", flush=True)
    return {"methods": rows, "paired_differences": paired, "pull_at_the_settings_of_the_ema": sweep}


def main() -> None:
    began = time.time()
    torch.set_num_threads(1)
    record: dict[str, object] = {"seeds": {"choosing": CHOOSING, "reporting": REPORTING}}
    for make in (quadratic, language_model):
        print(f"\n{make.__name__}: {make.__doc__}")
        record[make.__name__] = compare(make)
    record["seconds"] = round(time.time() - began)
    report("pace-quality", record, {})


if __name__ == "__main__":
    main()
