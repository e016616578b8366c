"""How much of an offloaded update hides behind the training step of a 1B-parameter Llama on an accelerator.

The model trains with its averages on the host, updated after every step, and without; steps alternate in groups, and
groups with averages start while the update of the step before is under way, as in a long run.

    hidden = 1 - (step with averages - step without) / (one update alone: copy and averaging, nothing beside it)

Needs an accelerator; without one, a tiny model shows that the program runs. Run: ``PYTHONPATH=src python
benchmarks/offload.py [--dtype bfloat16 float32] [--batch 8] [--length 2048] [--rounds 6]``. The result is written to
benchmarks/results/offload-DTYPE.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from _harness import measure, report
from transformers import LlamaConfig, LlamaForCausalLM

from lagless import BEMA, Averager
from lagless.averaging import _bank, _offload

BILLION = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18, "num_attention_heads": 16}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS = 4  # per group


class Training:
    """Steps of AdamW on random tokens; float32 parameters are trained under bfloat16 autocast."""

    def __init__(self, shape: dict[str, Any], vocabulary: int, dtype: torch.dtype, device: torch.device, batch, length):
        torch.manual_seed(0)
        with device:
            model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape))
            self.tokens = torch.randint(vocabulary, (batch, length))
        self.model = model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device.type != "cpu")
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32)

    def step(self) -> None:
        with self.autocast:
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True)
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        if device is None:
            tiny_run(dtype)
            continue
        training = Training(BILLION, 32000, dtype, device, arguments.batch, arguments.length)
        seconds = time_steps(training, device, arguments.rounds)
        numel = sum(p.numel() for p in training.model.parameters())
        record = {
            "parameters": numel,
            "copied_bytes": numel * dtype.itemsize,
            "staging_bytes": _offload.STAGING_BYTES,
            "tokens_per_step": training.tokens.numel(),
            "rounds": arguments.rounds,
            "steps_per_group": STEPS,
            "seconds": seconds,
        }
        print(
            f"{numel / 1e9:.2f}B parameters, {name}: " + ", ".join(f"{k} {s * 1e3:.1f} ms" for k, s in seconds.items())
        )
        hidden = 1.0 - (seconds["step with averages"] - seconds["step"]) / seconds["update alone"]
        report(f"offload-{name}", record, {f"hidden, {name}": (hidden, ">=", 0.9)})
        del training
        torch.get_device_module(device).empty_cache()


def time_steps(training: Training, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of a step without averages, of one with them, and of an update alone."""
    averager = Averager(training.model, BEMA.paper(update_freq=1), device="cpu")
    synchronize = torch.get_device_module(device).synchronize

    def group(averaged: bool) -> float:
        """Seconds per step, in the middle of a run."""
        attachment = averager.attach(training.optimizer) if averaged else None
        training.step()
        synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            training.step()
        synchronize()
        seconds = (time.perf_counter() - began) / STEPS
        if attachment is not None:
            attachment.remove()
        averager.wait()
        return seconds

    def update() -> None:
        averager.update()
        averager.wait()

    groups = [(group(False), group(True)) for _ in range(1 + rounds)][1:]
    without, averaged = (statistics.median(column) for column in zip(*groups, strict=True))
    alone = measure({"update": update}, rounds)["update"]
    return {"step": without, "step with averages": averaged, "update alone": alone}


def tiny_run(dtype: torch.dtype) -> None:
    """The same with the CPU in the place of the accelerator; its averages must equal those that are not offloaded."""
    print(f"no accelerator: a tiny run in {dtype}, whose times say nothing")
    _bank.can_overlap = lambda device: True
    device = torch.device("cpu")
    training = Training(TINY, 256, dtype, device, 2, 16)
    time_steps(training, device, rounds=1)
    offloaded = Averager(training.model, BEMA.paper(update_freq=1), device="cpu")
    plain = Averager(training.model, BEMA.paper(update_freq=1))
    offloaded.attach(training.optimizer)
    for _ in range(5):
        training.step()
        plain.update()
    equal = all(torch.equal(tensor, offloaded.read()[name]) for name, tensor in plain.read().items())
    print(f"{offloaded.updates()} updates, averages {'equal' if equal else 'DIFFERENT from'} those kept with the model")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
