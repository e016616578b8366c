"""Which model is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lagless.lab.recipes._section import Section

Dtype = Literal["float32", "bfloat16", "float16"]
_CHAT_TEMPLATE = (
    "Template of conversations: chatml, a tokenizer (hub name or folder) whose template to use, or a .jinja file. "
    "None: the tokenizer's own."
)


class PretrainedModel(Section):
    """A model that exists already; its weights are θ_0."""

    kind: Literal["pretrained"] = Field(description="A pretrained model.")
    path: str = Field(description="Hub name or local folder, as from_pretrained takes it.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; None for the default one.")
    dtype: Dtype = Field("float32", description="Type of the weights. Autocast is training.precision.")
    chat_template: str | None = Field(None, description=_CHAT_TEMPLATE)


class NewModel(Section):
    """A model with random weights, which follow from the seed."""

    kind: Literal["new"] = Field(description="An architecture with random weights.")
    architecture: str = Field(description="model_type of transformers: llama, qwen2, gpt2, ...")
    config: dict[str, bool | int | float | str] = Field(
        description="Arguments of its configuration, by their names in transformers; vocab_size is the tokenizer's "
        "unless it is given."
    )
    tokenizer: str | int = Field(
        description="Hub name or folder of a tokenizer; a number trains a byte-level BPE with that many tokens on the "
        "training text."
    )
    dtype: Dtype = Field("float32", description="Type of the weights. Autocast is training.precision.")
    chat_template: str | None = Field(None, description=_CHAT_TEMPLATE)


Model = Annotated[PretrainedModel | NewModel, Field(discriminator="kind")]
