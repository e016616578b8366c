"""Steps of optimizers wait for no device: parameters on device meta have no values that could be read."""

import pytest
import torch
from torch import nn

import lagless
from lagless.optim import PACE, PrimalAveraging, Pullback

EMA = lagless.EMA(decay=0.99)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta")) for shape in ((300, 40), (7,))]


def rate() -> torch.Tensor:
    return torch.tensor(1e-3, dtype=torch.float32, device="meta")


OPTIMIZERS = {
    "PACE": lambda p: PACE(p, lr=1e-3),
    "PACE, BEMA": lambda p: PACE(p, lr=1e-3, average=lagless.BEMA(update_freq=2)),
    "PACE, capturable": lambda p: PACE(p, lr=rate(), average=EMA, capturable=True),
    "Pullback": lambda p: Pullback(torch.optim.AdamW(p, lr=1e-3)),
    "PrimalAveraging of AdamW": lambda p: PrimalAveraging(torch.optim.AdamW(p, lr=1e-3)),
    "PrimalAveraging of SGD": lambda p: PrimalAveraging(torch.optim.SGD(p, lr=1e-3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_reads_a_value_from_the_device(name: str) -> None:
    given = parameters()
    optimizer = OPTIMIZERS[name](given)
    for _ in range(3):
        for parameter in given:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    if "capturable" not in name:  # whose step counts are on the device, and decide what eval() shows
        optimizer.eval()
        optimizer.train()


def test_a_learning_rate_on_the_cpu_is_refused_where_graphs_are_captured() -> None:
    on_cpu = torch.tensor(1e-3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"lr is a tensor on the CPU.*lr\.to\('meta'\)"):
        PACE(parameters(), lr=on_cpu, average=EMA, capturable=True)
    optimizer = PACE(parameters(), lr=rate(), average=EMA, capturable=True)
    with pytest.raises(ValueError, match="lr is a tensor on the CPU"):
        optimizer.add_param_group({"params": parameters(), "lr": on_cpu})
    assert len(optimizer.param_groups) == 1
    PACE([nn.Parameter(torch.ones(2, dtype=torch.float32))], lr=on_cpu, average=EMA, capturable=True)
