"""The model and its tokenizer, from the section of a recipe that says which."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from lagless.lab.data import Document, train_tokenizer
from lagless.lab.recipes import NewModel, Recipe

_MARKERS = ("<|im_start|>", "<|im_end|>")
_TOKENIZER_TEXT = 10_000_000  # characters to learn merges from


def build_tokenizer(recipe: Recipe, documents: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, with its chat template, or one trained on ``documents``.

    Raises:
        ValueError: if there is no such tokenizer, or no chat template for conversations.
    """
    model = recipe.model
    if isinstance(model, NewModel) and isinstance(model.tokenizer, int):
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(list(_first(documents, _TOKENIZER_TEXT)), model.tokenizer)
    else:
        revision = None if isinstance(model, NewModel) else model.revision
        tokenizer = _tokenizer(str(model.tokenizer if isinstance(model, NewModel) else model.path), revision)
    if recipe.data.kind != "sft":
        return tokenizer
    if model.chat_template is not None:
        tokenizer.chat_template = _chat_template(model.chat_template)
    if not tokenizer.chat_template:
        raise ValueError(
            f"model.chat_template: the tokenizer {tokenizer.name_or_path} has no chat template. Set the field to "
            "chatml, to a tokenizer that has one, or to a .jinja file."
        )
    if all(marker in tokenizer.chat_template for marker in _MARKERS):
        tokenizer.add_special_tokens({"additional_special_tokens": list(_MARKERS)}, replace_extra_special_tokens=False)
        tokenizer.eos_token = _MARKERS[1]  # so that a model ends its turn
    return tokenizer


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model at θ_0, with an embedding for every token.

    Raises:
        ValueError: if there is no such model, or its configuration is not possible.
    """
    set_seed(recipe.seed)
    dtype = getattr(torch, recipe.model.dtype)
    if isinstance(recipe.model, NewModel):
        model = _new(recipe.model, tokenizer, dtype)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(recipe.model.path, revision=recipe.model.revision, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(_not_loaded(recipe.model.path, error)) from error
    if len(tokenizer) > len(model.get_input_embeddings().weight):  # pyright: ignore
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.use_cache = False
    return model


def _new(section: NewModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    settings: dict[str, Any] = {"vocab_size": len(tokenizer), **special, **section.config}
    try:
        # Unknown arguments would become attributes that nothing reads.
        defaults = AutoConfig.for_model(section.architecture)
        if unknown := sorted(
            settings.keys() - defaults.to_dict().keys() - defaults.attribute_map.keys() - {"rope_theta"}
        ):
            raise ValueError(f"{section.architecture} has no {', '.join(unknown)}")
        config = AutoConfig.for_model(section.architecture, **settings)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.config: {error}. Its names are those of transformers' configuration.") from error


def _tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(_not_loaded(name, error)) from error


def _not_loaded(name: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"model: {name} cannot be loaded, neither from a folder nor from the hub ({reason}). "
        "Check the name and the network, or give a folder."
    )


def _chat_template(name: str) -> str:
    if name == "chatml":
        packaged = importlib.resources.files("lagless.lab.training") / "chatml.jinja"
        return packaged.read_text(encoding="utf-8")
    if name.endswith(".jinja"):
        if not Path(name).is_file():
            raise ValueError(f"model.chat_template: {name} does not exist.")
        return Path(name).read_text(encoding="utf-8")
    template = _tokenizer(name).chat_template
    if not isinstance(template, str):
        raise ValueError(f"model.chat_template: the tokenizer {name} has not one chat template. Name another one.")
    return template


def _first(texts: Iterable[str], characters: int) -> Iterable[Document]:
    for number, text in enumerate(texts):
        yield Document(str(number), text[:characters])
        characters -= len(text)
        if characters <= 0:
            return
