"""Cost of watching the gradient noise scale: training steps of a small Llama with and without it, side by side.

Needs ``pip install -e '.[bench]'``. Run: ``python benchmarks/noise_scale.py [--repeats 31] [--device cuda]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from _harness import report
from transformers import LlamaConfig, LlamaForCausalLM

from lagless import GradientNoise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="sequences per microbatch")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    arguments = parser.parse_args()

    model = make_model(arguments)
    plain, watched = training(arguments, model, False), training(arguments, make_model(arguments), True)
    ratios, plain_s, watched_s = [], [], []
    for repeat in range(arguments.repeats + 2):
        # The first of a pair alternates: a slow moment of the machine hits both alike.
        order = (plain, watched) if repeat % 2 else (watched, plain)
        times = {step: timed(step) for step in order}
        if repeat >= 2:
            ratios.append(times[watched] / times[plain])
            plain_s.append(times[plain])
            watched_s.append(times[watched])
    ratio = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"{statistics.median(plain_s) * 1e3:.1f} ms a step; ratio {ratio:.4f}, quartiles {low:.4f} and {high:.4f}")
    report(
        f"noise-scale-{arguments.device}",
        {
            "model": f"Llama, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters",
            "tokens_per_microbatch": arguments.batch * arguments.length,
            "microbatches": arguments.microbatches,
            "repeats": arguments.repeats,
            "seconds": {"without": statistics.median(plain_s), "with": statistics.median(watched_s)},
            "quartiles_of_ratio": [low, high],
        },
        {"step with GradientNoise / without, median of pairs": (ratio, "<=", 1.02)},
    )


def make_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(arguments.device)


def training(arguments: argparse.Namespace, model: LlamaForCausalLM, watch: bool) -> Callable[[], None]:
    """One training step, ready to be called again and again."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    noise = GradientNoise(model, samples_per_microbatch=arguments.batch) if watch else None
    if noise is not None:
        noise.attach(optimizer)
    tokens = torch.randint(arguments.vocabulary, (arguments.microbatches, arguments.batch, arguments.length))
    tokens = tokens.to(arguments.device)

    def step() -> None:
        _ = noise  # kept as long as the step is
        for microbatch in tokens:
            (model(input_ids=microbatch, labels=microbatch).loss / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    return step


def timed(step: Callable[[], None]) -> float:
    """Processor time on CPUs, which hardly sees a busy machine; time on the wall elsewhere."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    step()
    return clock() - began


if __name__ == "__main__":
    main()
