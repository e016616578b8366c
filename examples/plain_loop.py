"""Averages in a loop of your own, around an optimizer of your own: two lines more.

    python examples/plain_loop.py --steps 1000

A small network learns a teacher from noisy answers, at a constant learning rate. Then the run is stopped halfway and
resumed, which changes no bit.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from lagless import BEMA, EMA, Averager

NOISE = 0.5
# For short runs; docs/choose.md says more.
RULES = {"ema": EMA(half_life_fraction=0.05), "bema": BEMA.paper(ema_power=0.65, bias_power=0.4, update_freq=1)}


class SignMomentum(torch.optim.Optimizer):
    """Steps along the sign of the averaged gradient. Any ``torch.optim.Optimizer`` can be followed."""

    def __init__(self, params, lr: float, momentum: float = 0.9):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                parameter.sub_(mean.sign(), alpha=group["lr"])


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))


def make_run(steps: int) -> tuple[nn.Module, torch.optim.Optimizer, Averager]:
    torch.manual_seed(1)
    model = network(32)
    optimizer = SignMomentum(model.parameters(), lr=3e-3)
    avg = Averager(model, RULES, total_steps=steps)  # line 1
    avg.attach(optimizer)  # line 2
    return model, optimizer, avg


def train(model: nn.Module, optimizer: torch.optim.Optimizer, teacher: nn.Module, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)  # a batch depends on its step alone
        inputs = torch.randn(16, 8, generator=generator)
        with torch.no_grad():
            answers = teacher(inputs) + NOISE * torch.randn(16, 1, generator=generator)
        optimizer.zero_grad()
        (model(inputs) - answers).square().mean().backward()
        optimizer.step()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args(arguments).steps

    torch.manual_seed(0)
    teacher = network(16)
    inputs = torch.randn(4000, 8)

    @torch.no_grad()
    def error(model: nn.Module) -> float:
        return (model(inputs) - teacher(inputs)).square().mean().item()

    model, optimizer, avg = make_run(steps)
    train(model, optimizer, teacher, range(steps))
    print(f"squared distance to the teacher after {steps} steps (variance of the answers' noise: {NOISE**2})")
    print(f"  live  {error(model):.5f}")
    for name in avg.rules:
        with avg.applied(name):
            print(f"  {name:5} {error(model):.5f}")

    with tempfile.TemporaryDirectory() as folder:
        half, half_optimizer, half_avg = make_run(steps)
        train(half, half_optimizer, teacher, range(steps // 2))
        torch.save({"model": half.state_dict(), "optimizer": half_optimizer.state_dict()}, Path(folder, "live.pt"))
        half_avg.save(Path(folder, "averages.safetensors"))

        resumed, resumed_optimizer, resumed_avg = make_run(steps)
        live = torch.load(Path(folder, "live.pt"), weights_only=True)
        resumed.load_state_dict(live["model"])
        resumed_optimizer.load_state_dict(live["optimizer"])
        resumed_avg.load(Path(folder, "averages.safetensors"))
        train(resumed, resumed_optimizer, teacher, range(steps // 2, steps))

    def bits(averager: Averager) -> list[Tensor]:
        return [tensor for name in averager.rules for tensor in averager.read(name).values()]

    same = all(torch.equal(a, b) for a, b in zip(bits(avg), bits(resumed_avg), strict=True))
    print(f"stopped at step {steps // 2} and resumed: averages bitwise the same: {same}")


if __name__ == "__main__":
    main()
