"""The demo from start to end: text, training, averages, evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lagless.averaging import Averager
from lagless.integrations.distributed import export_model
from lagless.lab.data import Document, train_tokenizer
from lagless.lab.demo._data import Corpus
from lagless.lab.demo._evaluate import HeldOut, paired_difference, sample, sequence_losses
from lagless.lab.demo._plan import Plan
from lagless.lab.demo._progress import Display
from lagless.lab.demo._results import Candidate, DemoResult, Row, Sample
from lagless.lab.demo._tokens import encode, held_out_sequences, random_batches
from lagless.lab.demo._train import build_model, train
from lagless.rules import Rule, anchor, effective_iterates, mean_age, trajectory_weights

_PROMPT_TOKENS = 48
_SAMPLE_TOKENS = 160


@dataclass(frozen=True)
class _Loss:
    """Evaluates the live model or an average of it on held-out text, and writes each result down."""

    model: LlamaForCausalLM
    averager: Averager
    write: Callable[[dict[str, Any]], None]

    def __call__(self, name: str, step: int, held_out: HeldOut, text: str) -> Tensor:
        """The losses (N,) of ``name`` on every sequence."""
        if name == "live":
            losses = sequence_losses(self.model, held_out.tokens)
        else:
            with self.averager.applied(name):
                losses = sequence_losses(self.model, held_out.tokens)
        mean = float(losses.mean())
        self.write({"step": step, "model": name, "text": text, "loss": mean, "sequences": len(losses)})
        return losses


def run_study(plan: Plan, corpus: Corpus, folder: Path, out: Path, display: Display) -> DemoResult:
    """Train, average and evaluate.

    Args:
        plan: the settings.
        corpus: the text.
        folder: where to write ``run/``, ``averages/`` and ``metrics.jsonl`` now.
        out: where they will be in the end.
        display: shows how far it is.
    """
    began = time.monotonic()
    shape, documents = plan.shape, corpus.documents
    with display.task(f"training a tokenizer on {corpus.nbytes('train') / 1e6:.1f} MB of text"):
        tokenizer = train_tokenizer(documents["train"], shape.vocab_size)
        tokens = {split: encode(tokenizer, texts) for split, texts in documents.items()}
    curve = HeldOut(*held_out_sequences(tokens["validation"], shape.length, plan.curve_sequences))
    validation = HeldOut(*held_out_sequences(tokens["validation"], shape.length, plan.validation_sequences))
    test = HeldOut(*held_out_sequences(tokens["test"], shape.length, plan.test_sequences))

    model = build_model(plan, tokenizer)
    batches = random_batches(tokens["train"], shape.batch_size, shape.length, plan.seed)
    curves: dict[str, list[tuple[int, float]]] = {"live": []} | {name: [] for name in plan.rules()}
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics:

        def write(record: dict[str, Any]) -> None:
            metrics.write(json.dumps(record) + "\n")

        def evaluate(step: int, averager: Averager) -> None:
            loss = _Loss(model, averager, write)
            for name, points in curves.items():
                if name == "live" or averager.updates(name):
                    points.append((step, float(loss(name, step, curve, "curve").mean())))
            display.evaluated({name: points[-1][1] for name, points in curves.items() if points})

        with display.training(plan.steps):
            averager = train(plan, model, tokenizer, batches, folder / "run", evaluate, display.trained)

        loss = _Loss(model, averager, write)
        names = ["live", *plan.rules()]
        with display.task(f"choosing the best of {len(names) - 1} averages on validation text", len(names)) as advance:
            means: dict[str, float] = {}
            for name in names:
                means[name] = float(loss(name, plan.steps, validation, "validation").mean())
                advance()
        candidates = tuple(
            _candidate(plan, name, rule, means[name] - means["live"]) for name, rule in plan.rules().items()
        )
        chosen = _chosen(plan, candidates)
        with display.task("measuring them on test text", len(chosen) + 1) as advance:
            live = loss("live", plan.steps, test, "test")
            losses: dict[str, Tensor] = {}
            for label, candidate in chosen.items():
                losses[label] = loss(candidate.name, plan.steps, test, "test")
                advance()

    rows = tuple(
        Row(
            label,
            label.lower().replace(" ", "-"),
            candidate,
            float(losses[label].mean()),
            paired_difference(losses[label], live, test.files),
        )
        for label, candidate in chosen.items()
    )
    with display.task("saving the averages"):
        for row in rows:
            export_model(averager, model, folder / "averages" / row.folder, row.candidate.name, tokenizer=tokenizer)
    winner = min(rows, key=lambda row: row.candidate.validation)
    with display.task("writing two samples of text"):
        text = _sample(plan, model, averager, tokenizer, documents["test"], tokens["test"], winner)
    return DemoResult(
        out=out,
        plan=plan,
        corpus=corpus.description,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=time.monotonic() - began,
        live_loss=float(live.mean()),
        rows=rows,
        matched=paired_difference(losses["BEMA"], losses["EMA"], test.files),
        best=paired_difference(losses["best BEMA"], losses["best EMA"], test.files),
        candidates=candidates,
        curves=curves,
        sample=text,
        files=len(test.files.unique()),
        tokens=test.tokens[:, 1:].numel(),
    )


def _candidate(plan: Plan, name: str, rule: Rule, difference: float) -> Candidate:
    # Up to the end of warm-up averages follow the live weights, so that is where θ_0 is.
    steps = range(plan.warmup, plan.steps + 1)
    weights = trajectory_weights(rule, steps)
    return Candidate(
        name, rule, difference, mean_age(weights, steps), effective_iterates(weights), anchor(rule, steps).weight
    )


def _chosen(plan: Plan, candidates: tuple[Candidate, ...]) -> dict[str, Candidate]:
    """The matched rules, and of each kind the one with the lowest validation loss."""
    named = {candidate.name: candidate for candidate in candidates}
    rows = {type(rule).__name__: named[name] for name, rule in plan.matched().items()}
    best: dict[str, Candidate] = {}
    for kind in rows:
        own = [candidate for candidate in candidates if type(candidate.rule).__name__ == kind]
        best[f"best {kind}"] = min(own, key=lambda candidate: candidate.validation)
    return rows | best


def _sample(
    plan: Plan,
    model: LlamaForCausalLM,
    averager: Averager,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[Document],
    tokens: list[Tensor],
    winner: Row,
) -> Sample:
    """The beginning of the first long enough test file, which nobody picked by hand, continued by both models."""
    long = [i for i, ids in enumerate(tokens) if len(ids) > _PROMPT_TOKENS]
    first = min(long, key=lambda i: documents[i].name)
    prompt = tokens[first][:_PROMPT_TOKENS]

    def text(ids: Tensor) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def continued() -> str:
        ids = sample(model, prompt, _SAMPLE_TOKENS, plan.shape.length, plan.seed)
        return text(ids)

    live = continued()
    with averager.applied(winner.candidate.name):
        average = continued()
    return Sample(documents[first].name, text(prompt), live, average)
