"""Averages during direct preference optimisation, with TRL's DPOTrainer: one line more.

    python examples/dpo_average.py --steps 150

A tiny Llama learns to prefer going on in the alphabet to other letters. Both models are evaluated on prompts that
training does not see; the averaged one ends up in ``averaged/``, ready to load.
"""

import argparse
import copy
import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer

from lagless import BEMA, EMA
from lagless.integrations.transformers import AveragingCallback

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# For short runs; docs/choose.md says more.
RULES = {"ema": EMA(half_life_fraction=0.05), "bema": BEMA.paper(ema_power=0.65, bias_power=0.4, update_freq=1)}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *LETTERS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def preferences(count: int, seed: int) -> Dataset:
    """Prompts of three letters. Chosen: the two that follow; rejected: two random ones; swapped once in ten times."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        start = draw.randrange(26)
        letters = [LETTERS[(start + i) % 26] for i in range(5)]
        answers = [" " + " ".join(letters[3:]), " " + " ".join(draw.sample(LETTERS, 2))]
        if draw.random() < 0.1:
            answers.reverse()
        rows.append({"prompt": " ".join(letters[:3]), "chosen": answers[0], "rejected": answers[1]})
    return Dataset.from_list(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args(arguments).steps

    torch.manual_seed(0)
    words = tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            bos_token_id=None,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            ref_model=copy.deepcopy(model),
            args=DPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=4,
                per_device_eval_batch_size=64,
                learning_rate=3e-3,
                lr_scheduler_type="constant",
                eval_strategy="steps",
                eval_steps=max(1, steps // 3),
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=preferences(4 * steps, seed=0),
            eval_dataset=preferences(256, seed=1),
            processing_class=words,
            callbacks=[AveragingCallback(RULES)],  # the line
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        print("DPO loss on held-out preferences")
        for name, metric in [("live", "eval_loss"), *((rule, f"eval_{rule}_loss") for rule in RULES)]:
            for entry in trainer.state.log_history:
                if metric in entry:
                    print(f"  {name:5} step {entry['step']:4}  {entry[metric]:.4f}")

        averaged = AutoModelForCausalLM.from_pretrained(Path(folder, "averaged", "ema"))
        prompt = words("c d e", return_tensors="pt").input_ids
        answers = [words.decode(m.generate(prompt, max_new_tokens=2, do_sample=False)[0]) for m in (model, averaged)]
        print(f"what follows: live {answers[0]!r}, ema {answers[1]!r}")


if __name__ == "__main__":
    main()
