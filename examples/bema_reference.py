"""BEMA as the moving reference of reinforcement learning, in the manner of GRPO.

    python examples/bema_reference.py --steps 120

A penalty on the KL divergence holds a policy near a reference. A reference that stays where the run began holds it back
more and more; BEMA of the policy itself follows, so it forbids fast moves, not far ones. It lives in the policy's
Averager: there is no second model, and its log-probabilities are computed with the averaged weights swapped in.

The policy is a tiny Llama; the reward of an answer is the share of its words that follow on the one before. All runs
generate with the live weights and see the same prompts; those with a reference pay the same price for divergence.
"""

import argparse
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lagless import BEMA, Averager

WORDS, PROMPT, ANSWER, GROUP, PROMPTS = 16, 2, 6, 8, 8
PRICE = 0.3  # of one nat of divergence, per word


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=PROMPT + ANSWER,
        )
    )


@torch.no_grad()
def generate(model: LlamaForCausalLM, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Sampled answers behind their prompts."""
    tokens = prompts
    for _ in range(ANSWER):
        probabilities = model(input_ids=tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return tokens


def reward(tokens: Tensor) -> Tensor:
    """Share of the answer's words that are the successor of the word before."""
    words = tokens[:, PROMPT - 1 :]
    return (words[:, 1:] == (words[:, :-1] + 1) % WORDS).float().mean(1)


def log_probabilities(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Of each word of the answers, shape (B, ANSWER)."""
    logits = model(input_ids=tokens).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return logits.gather(-1, tokens[:, PROMPT:, None]).squeeze(-1)


def train(steps: int, reference: str) -> tuple[LlamaForCausalLM, Averager]:
    model, start, generator = llama(), llama(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    avg = Averager(model, BEMA(), total_steps=steps)
    avg.attach(optimizer)

    @torch.no_grad()
    def log_reference(tokens: Tensor) -> Tensor:
        if reference == "bema" and avg.updates() > 0:
            with avg.applied():
                return log_probabilities(model, tokens)
        return log_probabilities(start, tokens)  # which BEMA is, before its first update

    for _ in range(steps):
        prompts = torch.randint(WORDS, (PROMPTS, PROMPT), generator=generator).repeat_interleave(GROUP, 0)
        tokens = generate(model, prompts, generator)
        rewards = reward(tokens).view(PROMPTS, GROUP)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        held_by = log_reference(tokens)  # before the live forward pass, whose backward needs the weights untouched
        live = log_probabilities(model, tokens)
        loss = -((live - live.detach()).exp() * advantages.view(-1, 1)).mean()
        if reference != "none":
            log_ratio = held_by - live
            loss = loss + PRICE * (log_ratio.exp() - log_ratio - 1).mean()  # GRPO's estimate of the divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, avg


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args(arguments).steps

    start = llama()
    print(f"after {steps} steps, on 2048 fresh answers")
    print("reference  weights  reward  KL from the start, per word")
    for reference in ("start", "bema", "none"):
        model, avg = train(steps, reference)
        for weights, swap in (("live", nullcontext()), ("bema", avg.applied())):
            generator = torch.Generator().manual_seed(2)
            prompts = torch.randint(WORDS, (2048, PROMPT), generator=generator)
            with swap, torch.no_grad():
                tokens = generate(model, prompts, generator)
                moved = (log_probabilities(model, tokens) - log_probabilities(start, tokens)).mean().item()
            print(f"{reference:9}  {weights:7}  {reward(tokens).mean().item():.3f}   {moved:.3f}")


if __name__ == "__main__":
    main()
