"""Data for training and evaluation: from the hub or local files to token sequences, the held-out part set aside."""

from lagless.lab.data._conversations import conversations as conversations
from lagless.lab.data._noise import replace_spans as replace_spans
from lagless.lab.data._packing import packed as packed
from lagless.lab.data._rows import read_rows as read_rows
from lagless.lab.data._split import is_held_out as is_held_out, split_rows as split_rows
from lagless.lab.data._tokenizer import (
    Document as Document,
    end_of_text as end_of_text,
    train_tokenizer as train_tokenizer,
)
