"""What a model is trained on, and what is held out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lagless.lab.recipes._section import Section


class Source(Section):
    """Where examples come from, and how they are split into training and held-out ones."""

    path: str = Field(
        description="Data set of the hub; or a local file (.jsonl, .json, .csv, .parquet, .txt, also .gz, .xz, .bz2), "
        "or a folder of save_to_disk."
    )
    config: str | None = Field(None, description="Configuration of a data set of the hub.")
    split: str = Field("train", description="Split of a data set of the hub or of a saved folder.")
    validation_path: str | None = Field(None, description="Held-out examples, as in path. None: they are split off.")
    validation_split: str | None = Field(None, description="Held-out split of the same data set.")
    validation_fraction: float = Field(
        0.01, gt=0, lt=1, description="Share of the examples to hold out where no other held-out examples are named."
    )
    group_column: str | None = Field(
        None, description="Examples that are equal in this column are held out together, such as templates of one text."
    )
    split_seed: int = Field(
        42, ge=0, description="Of the choice of what is held out; the same for every seed of training."
    )

    @model_validator(mode="after")
    def _one_validation(self) -> Source:
        if self.validation_path is not None and self.validation_split is not None:
            raise ValueError("validation_path and validation_split are both given; leave one out")
        return self


class SftData(Source):
    """Conversations, or pairs of instruction and response."""

    kind: Literal["sft"] = Field(description="Supervised fine-tuning on conversations.")
    messages_column: str = Field("messages", description="Column of lists of {role, content}.")
    prompt_column: str | None = Field(
        None, description="Column of instructions; if given, it and response_column take the place of messages_column."
    )
    input_column: str | None = Field(None, description="Column appended to the instruction where it is not empty.")
    response_column: str | None = Field(None, description="Column of responses.")
    max_length: int = Field(gt=0, description="Longest conversation, in tokens.")
    too_long: Literal["drop", "truncate"] = Field("truncate", description="What is done with longer ones.")
    loss_on: Literal["all", "assistant"] = Field(description="Tokens whose cross-entropy is the loss.")
    packing: bool = Field(False, description="Put several conversations into one sequence instead of padding.")
    processes: int = Field(1, ge=1, description="Processes that tokenize.")

    @model_validator(mode="after")
    def _prompt_and_response(self) -> SftData:
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column belong together; give both or neither")
        if self.input_column is not None and self.prompt_column is None:
            raise ValueError("input_column needs prompt_column and response_column")
        return self


class SpanNoise(Section):
    """Blocks of tokens replaced by spans of other sequences, in the training data only."""

    sequences: float = Field(0.2, ge=0, le=1, description="q, the share of sequences that are corrupted.")
    least: float = Field(0.2, ge=0, le=1, description="Smallest share of a corrupted sequence's blocks to replace.")
    most: float = Field(0.4, ge=0, le=1, description="Largest share; each sequence draws its own.")
    block: int = Field(64, ge=1, description="Tokens in a block.")
    seed: int = Field(123, ge=0, description="Of the corruption; the same for every seed of training.")

    @model_validator(mode="after")
    def _ordered(self) -> SpanNoise:
        if self.least > self.most:
            raise ValueError(f"least={self.least} is above most={self.most}")
        return self


class PretrainingData(Source):
    """Documents, tokenized, joined with end-of-text tokens and cut into sequences of one length."""

    kind: Literal["pretraining"] = Field(description="Next-token prediction on text.")
    text_column: str = Field("text", description="Column of the documents.")
    separator: str = Field("<|endoftext|>", description="What separates the documents of a .txt file.")
    sequence_length: int = Field(gt=1, description="Tokens in a sequence.")
    noise: SpanNoise | None = Field(None, description="Corruption of the training sequences. None: clean.")


Data = Annotated[SftData | PretrainingData, Field(discriminator="kind")]
