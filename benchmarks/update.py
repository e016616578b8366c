"""Cost of one averaging update on the parameters of GPT-2 124M, against what people use today.

Needs ``pip install -e '.[bench]'``. Run: ``python benchmarks/update.py [--repeats 15] [--many]``.
"""

from __future__ import annotations

import argparse
import types

import torch
from _harness import measure, report, resident_bytes
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lagless import BEMA, EMA, Averager

MANY, SMALL = 20_000, 64  # tensors, elements of each
FOUR = {f"rule{i}": BEMA.paper(ema_power=power, update_freq=1) for i, power in enumerate((0.2, 0.3, 0.4, 0.5))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--many", action="store_true", help="only measure a model of 20,000 small tensors")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    if arguments.many:
        return many_tensors(arguments.device, arguments.repeats)
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).to(arguments.device)
    parameters = [p.detach() for p in model.parameters()]
    size = sum(p.numel() * p.element_size() for p in parameters)
    memory = {
        name: copies(model, rule, size) for name, rule in {"ema": EMA(), "bema": BEMA.paper(update_freq=1)}.items()
    }

    buffer = [p.clone() for p in parameters]
    candidates = {
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(buffer, parameters, 1e-3),
        "lagless, EMA": Averager(model, EMA()).update,
        "lagless, BEMA": Averager(model, BEMA.paper(update_freq=1)).update,
        "lagless, four BEMA rules": Averager(model, FOUR).update,
        "torch AveragedModel": torch_averaged_model(model),
        "ema-pytorch, foreach": ema_pytorch(model),
        "TRL BEMACallback": trl_bema(model, arguments.device),
    }
    four = "lagless, four BEMA rules"
    if arguments.device != "cpu":
        four += ", compiled"  # on CPUs there is nothing to compile but the C that several rules use anyway
        candidates[four] = Averager(model, FOUR, compile=True).update
        candidates = {name: synchronised(call) for name, call in candidates.items()}
    seconds = measure(candidates, arguments.repeats)

    base, one = seconds["torch._foreach_lerp_"], max(seconds["lagless, EMA"], seconds["lagless, BEMA"])
    print(f"GPT-2 124M, float32, {size / 1e6:.0f} MB, {arguments.repeats} repeats, medians")
    for name, s in seconds.items():
        share, bandwidth = s / base, 3 * size / s / 1e9
        print(f"{name:36s} {s * 1e3:9.2f} ms   {share:6.2f} x _foreach_lerp_   {bandwidth:6.1f} GB/s of 3 accesses")
    report(
        f"update-{arguments.device}",
        {"parameters": size // 4, "repeats": arguments.repeats, "seconds": seconds, "extra_copies": memory},
        {
            "one rule / _foreach_lerp_": (one / base, "<=", 1.15),
            "TRL / one rule": (seconds["TRL BEMACallback"] / one, ">=", 8.0),
            "four rules / one": (seconds[four] / one, "<=", 3.2),
            "extra copies, EMA": (memory["ema"], "<=", 1.05),
            "extra copies, BEMA": (memory["bema"], "<=", 2.05),
        },
    )


def many_tensors(device: str, repeats: int) -> None:
    """Cost of an update where calls cost more than memory traffic."""
    model = torch.nn.ParameterList(torch.randn(SMALL, device=device) for _ in range(MANY))
    parameters = [p.detach() for p in model]
    buffer = [p.clone() for p in parameters]
    candidates = {
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(buffer, parameters, 1e-1),
        "lagless, EMA": Averager(model, EMA(decay=0.9)).update,
        "lagless, EMA with small gains": Averager(model, EMA(decay=0.9999)).update,
        "lagless, two EMAs": Averager(model, {"a": EMA(decay=0.9), "b": EMA(decay=0.8)}).update,
        "lagless, step without an update": Averager(model, EMA(decay=0.9, update_freq=10**9)).update,
    }
    if device != "cpu":
        candidates = {name: synchronised(call) for name, call in candidates.items()}
    seconds = measure(candidates, repeats)
    base = seconds["torch._foreach_lerp_"]
    print(f"{MANY} tensors of {SMALL} elements, float32, {repeats} repeats, medians")
    for name, s in seconds.items():
        print(f"{name:36s} {s * 1e3:9.3f} ms   {s / base:6.2f} x _foreach_lerp_")
    report(
        f"update-many-{device}",
        {"tensors": MANY, "elements": SMALL, "repeats": repeats, "seconds": seconds},
        {
            "one rule / _foreach_lerp_": (seconds["lagless, EMA"] / base, "<=", 3.0),
            "small gains / _foreach_lerp_": (seconds["lagless, EMA with small gains"] / base, "<=", 3.0),
            "step without an update, ms": (seconds["lagless, step without an update"] * 1e3, "<=", 1.0),
        },
    )


def copies(model: torch.nn.Module, rule, size: int) -> float:
    """Growth of resident memory by an Averager and two of its updates, in copies of the parameters."""
    if next(model.parameters()).device.type != "cpu":
        state = Averager(model, rule).state_dict()["tensors"]
        return sum(t.numel() * t.element_size() for t in state.values()) / size
    before = resident_bytes()
    averager = Averager(model, rule)
    averager.update()
    averager.update()
    return (resident_bytes() - before) / size


def synchronised(call):
    def run():
        call()
        torch.cuda.synchronize()

    return run


def torch_averaged_model(model):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    averaged.update_parameters(model)
    return lambda: averaged.update_parameters(model)


def ema_pytorch(model):
    from ema_pytorch import EMA as PytorchEMA

    averaged = PytorchEMA(model, beta=0.999, update_after_step=0, update_every=1, use_foreach=True)
    return averaged.update


def trl_bema(model, device):
    from trl import BEMACallback

    callback = BEMACallback(update_freq=1, device=device)
    state = types.SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, None, model=model)
    step = iter(range(1, 10**9))

    def run():
        state.global_step = next(step)
        callback.on_step_end(None, state, None, model=model)

    return run


if __name__ == "__main__":
    main()
