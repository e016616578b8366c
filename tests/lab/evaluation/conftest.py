"""A tiny Llama over characters, its tokenizer, and runs of it; nothing is downloaded."""

import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

collect_ignore = ["stand_in"]  # what pytest collects it can import, too, and then there is a vllm

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Data sets are cached where the test ends."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def tokenizer():
    characters = ["<pad>", "<eos>", *string.printable]
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, [], unk_token="?"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def build(tokenizer, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


@pytest.fixture(scope="session")
def model(tokenizer):
    return build(tokenizer)


@pytest.fixture(scope="session")
def run(tokenizer, tmp_path_factory):
    """Six checkpoints of a model that learns a text, noisily: the last ones swing around a minimum."""
    folder, held = tmp_path_factory.mktemp("run"), build(tokenizer)
    tokens = torch.tensor(tokenizer("The cat sat on the mat and the dog sat on the log. " * 40)["input_ids"])
    optimizer = torch.optim.SGD(held.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(0)
    for step in range(61):
        if step % 10 == 0:
            held.save_pretrained(folder / f"checkpoint-{step}")
            tokenizer.save_pretrained(folder / f"checkpoint-{step}")
        starts = torch.randint(0, len(tokens) - 32, (2,), generator=generator)
        batch = torch.stack([tokens[i : i + 32] for i in starts])
        held(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return folder


@pytest.fixture
def text(tmp_path):
    """Held-out text, in two halves."""
    for name, line in (("validation", "The dog sat on the mat. "), ("test", "The cat and the dog sat on the log. ")):
        (tmp_path / f"{name}.txt").write_text(line * 60)
    return tmp_path / "validation.txt", tmp_path / "test.txt"
