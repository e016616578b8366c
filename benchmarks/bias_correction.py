"""Cost of bias-corrected AdamW: whole training steps of a small Llama, 8 microbatches, against torch's fused AdamW.

Needs ``pip install -e '.[bench]'``. Run: ``python benchmarks/bias_correction.py [--repeats 15] [--device cuda]``.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import multiprocessing

import torch
from _harness import measure, report, resident_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from lagless.optim import BiasCorrectedAdamW

MICROBATCHES = 8
SETTINGS = {
    "standard": {"cross_fit": "none"},
    "leave one out": {},
    "leave one out, jackknife": {"inverse_correction": "jackknife"},
    "leave one out, third moments": {"folds": "skewed"},
    "leave one out, exact": {"folds": "exact"},
    "split, pre-EMA": {"cross_fit": "split", "inverse_correction": "pre_ema"},
    "symmetric": {"cross_fit": "symmetric"},
    "leave one out, compiled": {"compile": True},
    "leave one out, jackknife, compiled": {"inverse_correction": "jackknife", "compile": True},
    "split, pre-EMA, compiled": {"cross_fit": "split", "inverse_correction": "pre_ema", "compile": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2, help="sequences per microbatch")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="settings to measure")
    arguments = parser.parse_args()
    chosen = {name: SETTINGS[name] for name in ("leave one out", *arguments.only)}
    logging.disable(logging.WARNING)

    candidates = {"torch AdamW, fused": training(arguments, None)}
    candidates |= {name: training(arguments, settings) for name, settings in chosen.items()}
    candidates["torch AdamW, fused, two passes"] = training(arguments, None, passes=2)
    seconds = measure(candidates, arguments.repeats)
    base = seconds["torch AdamW, fused"]
    # Compiled forms keep the same sums, but their compiler grows the process.
    eager = {name: settings for name, settings in chosen.items() if "compile" not in settings}
    copies = {name: buffers(arguments, x) for name, x in eager.items()} if arguments.device == "cpu" else {}
    for name, s in seconds.items():
        extra = f"{copies[name]:6.2f} extra copies" if name in copies else ""
        print(f"{name:34s} {s * 1e3:9.1f} ms   {s / base:6.3f} x torch AdamW, fused   {extra}")
    model = make_model(arguments)
    report(
        f"bias-{arguments.device}",
        {
            "model": f"Llama, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, untied embeddings",
            "tokens_per_microbatch": arguments.batch * arguments.length,
            "microbatches": MICROBATCHES,
            "repeats": arguments.repeats,
            "seconds": seconds,
            "ratio": {name: s / base for name, s in seconds.items()},
            "extra_copies_of_corrected_parameters": copies,
        },
        {
            **{
                f"{name} / torch AdamW fused": (seconds[name] / base, "<=", 1.15)
                for name in ("leave one out", "leave one out, compiled")
                if name in seconds
            },
            **({"extra copies, leave one out": (copies["leave one out"], "<=", 1.05)} if copies else {}),
        },
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


def training(arguments: argparse.Namespace, settings: dict | None, passes: int = 1):
    """One training step, ready to be called again and again; None is torch's fused AdamW."""
    model = make_model(arguments)
    if settings is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    else:
        optimizer = BiasCorrectedAdamW(model.named_parameters(), lr=1e-4, warm_start=0, **settings)
    tokens = torch.randint(arguments.vocabulary, (MICROBATCHES, arguments.batch, arguments.length))
    tokens = tokens.to(arguments.device)

    def step() -> None:
        for _ in range(passes):
            optimizer.zero_grad()
            for microbatch in tokens:
                (model(input_ids=microbatch, labels=microbatch).loss / MICROBATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    return step


def buffers(arguments: argparse.Namespace, settings: dict) -> float:
    """Growth of the resident memory by the microbatches' sums, in copies of the corrected parameters."""
    larger = argparse.Namespace(
        **vars(arguments) | {"hidden": 4 * arguments.hidden}
    )  # than what a process needs anyway
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process that has freed nothing yet
        return pool.apply(growth, (larger, settings))


def growth(arguments: argparse.Namespace, settings: dict) -> float:
    logging.disable(logging.WARNING)
    model = make_model(arguments)

    def backward() -> None:
        for p in model.parameters():
            (p * p.detach()).sum().backward()

    backward()
    optimizer = BiasCorrectedAdamW(model.named_parameters(), warm_start=0, **settings)
    trim = ctypes.CDLL("libc.so.6").malloc_trim  # freed temporaries that the allocator keeps are no buffers
    trim(0)
    before = resident_bytes()
    for _ in range(MICROBATCHES):
        backward()
    trim(0)
    grown = resident_bytes() - before
    # All but the embeddings, which are standard; where nothing is corrected there is nothing to compare with.
    corrected = [p for g in optimizer.param_groups if g["cross_fit"] != "none" for p in g["params"]]
    size = sum(p.numel() * p.element_size() for p in corrected)
    return grown / size if size else 0.0


if __name__ == "__main__":
    main()
