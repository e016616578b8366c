"""Documents, and a byte-level BPE tokenizer learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Document:
    """One piece of text; its ``name`` decides its split."""

    name: str
    text: str

    @property
    def nbytes(self) -> int:
        """Its length in UTF-8."""
        return len(self.text.encode())


def train_tokenizer(documents: Sequence[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (as GPT-2's) whose merges are learned from ``documents``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def end_of_text(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token between documents."""
    return tokenizer.get_vocab()[END_OF_TEXT]
