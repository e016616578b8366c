"""A recipe: everything that decides a training run."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lagless.lab.recipes._data import Data
from lagless.lab.recipes._method import Method
from lagless.lab.recipes._model import Model
from lagless.lab.recipes._rules import at_length
from lagless.lab.recipes._section import Section
from lagless.rules import Rule


class Training(Section):
    """The numbers of the training loop."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    embedding_learning_rate: float | None = Field(
        None, gt=0, description="Of the input and output embeddings; None for the same as all others."
    )
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps. Either this or epochs.")
    epochs: float | None = Field(None, gt=0, description="Passes over the training examples.")
    batch_size: int = Field(ge=1, description="Sequences in an optimizer step, over all processes.")
    micro_batch_size: int = Field(
        ge=1, description="Sequences that one process computes at once; the rest is gradient accumulation."
    )
    evaluation_batch_size: int = Field(8, ge=1, description="Likewise, in evaluation.")
    max_grad_norm: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 for no clipping.")
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type that autocast uses.")
    gradient_checkpointing: bool = Field(False, description="Compute activations twice instead of storing them.")
    log_every: int = Field(10, ge=1, description="Steps between records of the training loss.")
    save_every: int = Field(ge=1, description="Steps between checkpoints; the trajectory for averages afterwards.")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give one of max_steps and epochs")
        return self


class Evaluation(Section):
    """What is measured during training."""

    sequences: int = Field(200, ge=1, description="Held-out sequences, the same ones at every evaluation and seed.")
    every: int = Field(ge=1, description="Steps between evaluations; the last step is always one.")


class Sweep(Section):
    """Values to compare."""

    grid: dict[str, Annotated[list[bool | int | float | str], Field(min_length=1)]] = Field(
        {}, description="Dotted field → values, as --set takes them. All combinations are trained."
    )
    seeds: list[int] = Field([0], min_length=1, description="Seeds that every combination is trained with.")


class Recipe(Section):
    """A training run."""

    name: str = Field(description="Of this recipe.")
    summary: str = Field(description="What it trains.")
    reference: str | None = Field(None, description="Where its values are stated.")
    ours: list[str] = Field([], description="Fields whose values the reference does not state.")
    differences: list[str] = Field([], description="What is done otherwise than in the reference.")
    needs_accelerator: bool = Field(False, description="Refuse to start without a GPU or another accelerator.")
    seed: int = Field(0, ge=0, description="Of the initial weights, the order of the data and dropout.")
    model: Model = Field(description="What is trained.")
    data: Data = Field(description="What it is trained on.")
    method: Method = Field(description="How.")
    training: Training = Field(description="The training loop.")
    evaluation: Evaluation = Field(description="What is measured during training.")
    sweep: Sweep | None = Field(None, description="Values that lagless sweep compares by default.")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        method = self.method
        known = [*method.averages, "live", *(["optimizer"] if method.optimizer.keeps_average else [])]
        if reserved := method.averages.keys() & {"live", "optimizer"}:
            raise ValueError(f"method.averages: {' and '.join(sorted(reserved))} cannot be the name of an average")
        for name in method.averages:
            if not re.fullmatch(r"[\w.=+-]+", name):
                raise ValueError(f"method.averages: {name!r} is to be the name of a folder; use letters, digits, _.=+-")
        if method.returned not in known:
            raise ValueError(f"method.returned={method.returned!r}; there are {', '.join(known)}")
        if self.data.kind == "pretraining" and self.model.chat_template is not None:
            raise ValueError("model.chat_template is for conversations; leave it out for pretraining")
        if self.data.kind == "sft" and self.model.kind == "new" and isinstance(self.model.tokenizer, int):
            raise ValueError(
                f"model.tokenizer={self.model.tokenizer}: tokenizers are trained for pretraining only; name one"
            )
        return self

    def averages(self) -> dict[str, Rule]:
        """Return the averages of the run on its own clock; a run of so many epochs keeps the clock as stated."""
        total, stated = self.training.max_steps, self.method.averages_steps
        if total is None or stated is None:
            return dict(self.method.averages)
        return {name: at_length(rule, stated, total) for name, rule in self.method.averages.items()}

    def resolved(self, seed: int | None = None) -> Recipe:
        """The recipe of one run: with this seed, without the values that a sweep would put in."""
        return self.model_copy(update={"sweep": None} | ({} if seed is None else {"seed": seed}))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, without seed and sweep: the same for all runs that may be averaged over."""
        content = self.model_dump(mode="json", exclude={"seed", "sweep", "differences"})
        if content["method"]["averages_steps"] is None:  # so that recipes without it keep their digest
            del content["method"]["averages_steps"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
