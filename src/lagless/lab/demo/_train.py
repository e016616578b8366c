"""The model of the demo and its training run: one loop, one Averager, many rules."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lagless.averaging import Averager
from lagless.lab.data import end_of_text
from lagless.lab.demo._plan import Plan
from lagless.rules import AverageWarning


def build_model(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama with random weights, the same ones for the same seed."""
    shape = plan.shape
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2 * shape.length,
        tie_word_embeddings=True,
        bos_token_id=end_of_text(tokenizer),
        eos_token_id=end_of_text(tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return LlamaForCausalLM(config)


def train(
    plan: Plan,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterator[Tensor],
    run: Path,
    evaluate: Callable[[int, Averager], None],
    progress: Callable[[int], None],
) -> Averager:
    """Train ``model`` in place and follow all rules of the plan.

    Args:
        plan: the settings.
        model: the model, at its initial weights.
        tokenizer: goes along with every checkpoint, so that each loads on its own.
        batches: token batches (B, length), endless.
        run: the folder for ``checkpoint-N``, every ``plan.interval`` steps and at the end; ``checkpoint-0`` is θ_0.
        evaluate: called with the step and the Averager at every point of the curves.
        progress: called with every step.

    Returns:
        The Averager, at the last step.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / plan.warmup))
    with warnings.catch_warnings():  # the demo compares the rules, and its report tells their weights
        warnings.simplefilter("ignore", AverageWarning)
        averager = Averager(model, plan.rules(), total_steps=plan.steps)
    averager.attach(optimizer)

    def save(step: int) -> None:
        model.save_pretrained(run / f"checkpoint-{step}")
        tokenizer.save_pretrained(run / f"checkpoint-{step}")

    save(0)
    evaluate(0, averager)
    for step, batch in enumerate(itertools.islice(batches, plan.steps), start=1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # the Averager, attached, counts this step
        warmup.step()
        optimizer.zero_grad()
        progress(step)
        if step % plan.interval == 0 or step == plan.steps:
            save(step)
        if step % plan.evaluate_every == 0 or step == plan.steps:
            evaluate(step, averager)
    return averager
