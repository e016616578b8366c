"""Averages under Accelerate: gradient accumulation, checkpoints, exact resume.

    python examples/accelerate_loop.py --steps 200
    torchrun --nproc-per-node 2 examples/accelerate_loop.py

A tiny Llama learns sequences of a random Markov chain. Halfway, ``save_state`` writes a checkpoint; at the end the run
goes back to it and trains its second half again, which changes no bit.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lagless import BEMA, EMA, Averager

WORDS, LENGTH = 32, 24
# For short runs; docs/choose.md says more.
RULES = {"ema": EMA(half_life_fraction=0.05), "bema": BEMA.paper(ema_power=0.65, bias_power=0.4, update_freq=1)}


def sequences(chain: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sequences (count, LENGTH) of the Markov chain with transition probabilities ``chain``."""
    columns = [torch.randint(WORDS, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        columns.append(torch.multinomial(chain[columns[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(columns, 1)


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args(arguments).steps

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(0)
    generator = torch.Generator().manual_seed(0)
    chain = torch.randn(WORDS, WORDS, generator=generator).mul(2).softmax(-1)
    training = sequences(chain, steps * 2 * 8 * accelerator.num_processes, generator)
    validation = sequences(chain, 256, generator).to(accelerator.device)

    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(training, batch_size=8))
    avg = Averager(model, RULES, total_steps=steps)
    avg.attach(optimizer)

    # The averages go along with every checkpoint, as safetensors. (Accelerate would load what is passed to
    # register_for_checkpointing as an unrestricted pickle.)
    def save(models: list, weights: list, folder: str) -> None:
        avg.save(Path(folder, "averages.safetensors"))  # on every process: under FSDP2 each has a part

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(lambda models, folder: avg.load(Path(folder, "averages.safetensors")))

    def train(first: int, last: int) -> None:
        model.train()
        for number, batch in enumerate(accelerator.skip_first_batches(loader, 2 * first), 2 * first + 1):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=batch, labels=batch).loss)
                optimizer.step()  # with accumulated gradients, every second time; the averages count those
                optimizer.zero_grad()
            if number == 2 * last:
                break

    @torch.no_grad()
    def loss() -> float:
        model.eval()
        return model(input_ids=validation, labels=validation).loss.item()

    with tempfile.TemporaryDirectory() as own:
        [folder] = broadcast_object_list([own])  # that of the first process
        half = steps // 2
        train(0, half)
        accelerator.save_state(folder)
        accelerator.wait_for_everyone()
        train(half, steps)

        entropy = -(chain * chain.log()).sum(-1).mean().item()
        accelerator.print(
            f"validation loss after {avg.step} optimizer steps (guessing: {math.log(WORDS):.3f}, "
            f"mean entropy of the chain's words: {entropy:.3f})"
        )
        accelerator.print(f"  live  {loss():.4f}")
        for name in avg.rules:
            with avg.applied(name):
                accelerator.print(f"  {name:5} {loss():.4f}")

        before = avg.read("bema")
        accelerator.load_state(folder)
        train(half, steps)
        after = avg.read("bema")
        accelerator.wait_for_everyone()
    same = all(torch.equal(before[name], after[name]) for name in before)
    accelerator.print(f"resumed from step {half}: bema bitwise the same: {same}")


if __name__ == "__main__":
    main()
