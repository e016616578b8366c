"""A tiny Llama, a tokenizer made of the text below, and a Trainer of a second or less."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from lagless import trajectory_weights

TEXT = """An average of the weights is less noisy than any of them, and it lags behind all but the first. Where the
loss is steep the lag costs more than the noise; where it is flat the noise costs more than the lag. A corrected average
adds back a share of the way that the weights have come since the start, and so has less of both."""
WORDS = TEXT.split()
LENGTH = 8

QUIET = {
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "dataloader_pin_memory": False,
}


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<pad>", "<eos>"]
    tokenizer.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    inputs = ["input_ids", "attention_mask"]  # transformers 4.57 would add types, which a Llama does not take
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


TOKENIZER = make_tokenizer()


def make_model(seed=0, **options):
    config = LlamaConfig(
        **{
            "vocab_size": len(TOKENIZER),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": TOKENIZER.pad_token_id,
            "eos_token_id": TOKENIZER.eos_token_id,
            "bos_token_id": None,
            "attention_dropout": 0.1,  # so that training draws random numbers
        }
        | options
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def make_rows(first, count):
    """Windows of the text, as tokens to predict."""
    rows = [" ".join(WORDS[i : i + LENGTH]) for i in range(first, first + count)]
    encoded = [torch.tensor(TOKENIZER(row)["input_ids"]) for row in rows]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in encoded]


COMPILES_LAYERS = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="accelerate 1.11 cannot unwrap a model of which only layers are compiled (KeyError: '_orig_mod')",
)


def named_as_here(settings):
    """Settings under the names that this release of transformers has for them."""
    former = {"activation_checkpointing": "gradient_checkpointing"}
    known = TrainingArguments.__dataclass_fields__
    return {key if key in known else former.get(key, key): value for key, value in settings.items()}


def make_trainer(folder, callbacks=(), *, model=None, kind=Trainer, optimizers=(None, None), data=None, **settings):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    data = {"train_dataset": make_rows(0, 20), "eval_dataset": make_rows(24, 6)} if data is None else data
    return kind(
        make_model() if model is None else model,
        TrainingArguments(str(folder), **named_as_here(QUIET | settings)),
        processing_class=TOKENIZER,
        callbacks=list(callbacks),
        optimizers=optimizers,
        **data,
    )


class Recorder(TrainerCallback):
    """The trainable weights at every step, from θ_0 on."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.iterates = [weights(model)]

    def on_step_end(self, args, state, control, model, **kwargs):
        self.iterates.append(weights(model))

    def average(self, rule, at=None):
        """The rule's average of the recorded weights, from the weights that its filter has, in float64."""
        iterates = self.iterates if at is None else self.iterates[: at + 1]
        shares = trajectory_weights(rule, range(len(iterates)))
        return {
            name: sum(w * iterate[name].double() for w, iterate in zip(shares, iterates, strict=True))
            for name in iterates[0]
        }


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name].double(), second[name].double(), rtol=1e-5, atol=2e-6)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def hf():
    logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny, and several threads would only wait for each other
    yield SimpleNamespace(
        tokenizer=TOKENIZER, words=WORDS, quiet=QUIET, weights=weights, same=same, close=close,
        model=make_model, rows=make_rows, trainer=make_trainer, recorder=Recorder,
    )  # fmt: skip
    torch.set_num_threads(threads)
