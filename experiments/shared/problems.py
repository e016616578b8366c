"""Generated word problems as training text, held-out problems and a tokenizer in which every digit is a token."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lagless.lab.evaluation import problems

LEVEL, PROMPTS = 1, 64
_EQUATIONS, _BASE, _TRAINING, _VALIDATION, _VOCABULARY = 120_000, 30_000, 20_000, 150, 400
_END = "<|endoftext|>"


def prepare(out: Path) -> dict[str, Path]:
    """Write what is missing into ``out``: texts to train on, held-out problems, a tokenizer.

    ``base`` is equations and problems, for pretraining; ``train`` is problems alone, in the form of the task
    ``arithmetic``, with seeds of their own. The problems in ``valid`` have numbers that are neither trained on nor
    among the ``PROMPTS`` of that task.
    """
    files = {name: out / name for name in ("base.txt", "train.txt", "valid.jsonl", "tokenizer")}
    if not files["tokenizer"].is_dir():
        out.mkdir(parents=True, exist_ok=True)
        equations = [one.answer.split("\n")[0] for one in itertools.islice(problems("train", 2, LEVEL), _EQUATIONS)]
        base = [*(f" {equation}" for equation in equations), *_texts(1, _BASE)]
        random.Random(0).shuffle(base)
        for name, texts in (("base.txt", base), ("train.txt", _texts(0, _TRAINING))):
            files[name].write_text(_END.join(texts), encoding="utf-8")
        asked = dict.fromkeys(one.key for one in itertools.islice(problems("test", 0, LEVEL), 20 * PROMPTS))
        prompts = set(itertools.islice(asked, PROMPTS))
        rows = {
            one.key: json.dumps({"question": one.question, "answer": one.answer})
            for one in itertools.islice(problems("test", 1, LEVEL), 20 * _VALIDATION)
            if one.key not in prompts
        }
        files["valid.jsonl"].write_text(
            "\n".join(itertools.islice(rows.values(), _VALIDATION)) + "\n", encoding="utf-8"
        )
        _tokenizer(base[:20_000]).save_pretrained(files["tokenizer"])
    return files


def _texts(seed: int, count: int) -> list[str]:
    return [
        f"Question: {one.question}\nAnswer: {one.answer}"
        for one in itertools.islice(problems("train", seed, LEVEL), count)
    ]


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which each digit, with the blank before it, is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END, pad_token=_END)
