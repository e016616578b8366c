"""``lagless learn``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lagless.cli._average import Runs, Start, StartStep, Steps
from lagless.cli._console import err, out
from lagless.cli._evaluation_options import BatchSize, Device, Length, require
from lagless.cli._rule_options import chosen_rules, integers, rule_options

if TYPE_CHECKING:
    from lagless.lab.learn import Document, ItemLoss, Learned
    from lagless.rules import Rule


@rule_options
def learn_command(
    run: Runs,
    data: Annotated[str, typer.Option(help="Held-out documents: a file, or a data set of the hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL", help="Folder to make.")],
    settings: dict[str, Any],
    prior: Annotated[
        str | None, typer.Option(help="Rule that ridge pulls towards. Default: ema with half-life-fraction 0.05.")
    ] = None,
    mode: Annotated[
        list[str],
        typer.Option(help="Weights allowed: free, convex (none negative), decay (none on θ_0); repeat. Default: all."),
    ] = [],  # noqa: B006 (typer copies it)
    ridge: Annotated[list[float], typer.Option(help="Strength of the pull to the prior; repeat.")] = [  # noqa: B006
        0.001,
        0.01,
        0.1,
    ],
    evaluations: Annotated[int, typer.Option(help="Forward and backward passes over the data at most.")] = 12,
    merge: Annotated[
        bool, typer.Option(help="Each RUN is a model, or a run whose last checkpoint is meant: one weight for each.")
    ] = False,
    group: Annotated[
        list[str],
        typer.Option(metavar="NAME=REGEX", help="Tensors with REGEX in their name have weights of their own; repeat."),
    ] = [],  # noqa: B006
    loss: Annotated[str | None, typer.Option(help="module:function(model, tokenizer, rows) -> loss per row.")] = None,
    targets_per_weight: Annotated[float, typer.Option(help="Least targets to fit on per weight.")] = 500,
    start: Start = None,
    start_step: StartStep = None,
    steps: Steps = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Random seed of the split into parts that fit, choose and report.")] = 0,
    state: Annotated[
        Path | None, typer.Option(help="File to go on from when stopped. Default: MODEL.learning.json; removed at end.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights written: auto (as stored), float32, bfloat16, float16, float64.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    memory: Annotated[str, typer.Option(help="Most memory for buffers.")] = "256MiB",
    overwrite: Annotated[bool, typer.Option(help="Replace MODEL.")] = False,
) -> None:
    """Learn weights on a run's checkpoints from held-out loss, and report them on documents kept apart.

    The weights are shown as the learning-rate schedule they equal: do you still need to decay? With --merge they are
    those of a merge of models of several runs.
    """
    require("learn")
    from lagless.checkpoints import Trajectory, absolute_path, find_checkpoints, find_models, parse_size
    from lagless.lab.evaluate import load_tokenizer
    from lagless.lab.learn import learn, write_learned

    output = absolute_path(output)
    state = output.with_name(f"{output.name}.learning.json") if state is None else state
    if merge and (steps is not None or start is not None or start_step is not None or prior is not None or settings):
        raise ValueError("--merge: models of several runs have no order; --steps, --start and --prior do not apply.")
    source = (
        find_models(run)
        if merge
        else find_checkpoints(run[0] if len(run) == 1 else run, integers("--steps", steps), start, start_step)
    )
    groups = _groups(group)
    where: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size, "overwrite": overwrite}
    write_learned(source, None, output, groups=groups, **where)  # refuses MODEL now rather than at the end
    state.parent.mkdir(parents=True, exist_ok=True)
    documents, item_loss = _data_and_loss(data, loss, load_tokenizer(source.checkpoints[-1].folder), length)
    found = learn(
        source,
        documents,
        loss=item_loss,
        groups=groups,
        prior=_prior(source.steps, prior, settings) if isinstance(source, Trajectory) else None,
        modes=mode or None,  # type: ignore[arg-type]  # it says which there are
        ridges=ridge,
        evaluations=evaluations,
        seed=seed,
        batch_size=batch_size,
        targets_per_weight=targets_per_weight,
        device=device,
        memory=parse_size(memory),
        state=state,
        progress=_progress,
    )
    print_learned(found)
    write_learned(source, found, output, groups=groups, remarks={"loss": loss or "cross-entropy"}, **where)
    state.unlink(missing_ok=True)
    out.print(f"written to {output}", highlight=False, markup=False)


def _groups(given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for text, (name, separator, pattern) in zip(given, pairs, strict=True):
        if not (separator and name and pattern):
            raise ValueError(f"--group {text}; it must be NAME=REGEX, e.g. embeddings=embed_tokens.")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError(f"--group: two have the same name ({', '.join(name for name, _, _ in pairs)}).")
    return {name: pattern for name, _, pattern in pairs}


def _progress(doing: str, best: float | None) -> None:
    err.print(f"{doing}{'' if best is None else f'  best so far {best:.5f}'}", highlight=False, markup=False)


def _prior(steps: tuple[int, ...], name: str | None, settings: dict[str, Any]) -> Rule | None:
    if name is None:
        if settings:
            raise ValueError("rule arguments were given without --prior; say which rule they belong to.")
        return None
    return next(iter(chosen_rules(steps, [name], settings, []).values()))


def _data_and_loss(data: str, loss: str | None, tokenizer: Any, length: int) -> tuple[list[Document], ItemLoss]:
    from lagless.lab.learn import cross_entropy, load_loss, row_documents, text_documents

    if loss is None:
        return text_documents(data, tokenizer, length), cross_entropy
    own: Callable[..., Any] = load_loss(loss)

    def of_items(model: Any, items: Any) -> Any:
        return own(model, tokenizer, items)

    of_items.__module__, of_items.__qualname__ = loss.split(":")
    return row_documents(data), of_items


def print_learned(found: Learned) -> None:
    """Print the conclusion, the comparisons it rests on, and what the weights mean."""
    from lagless.cli._summaries import sparkline
    from lagless.lab.learn import conclusions, schedule_in_words
    from lagless.rules import schedule_of

    for line in conclusions(found):
        out.print(line, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for column in ("against", "", "its loss", "learned minus it"):
        table.add_column(column, overflow="fold")
    for c in found.comparisons:
        gain = f"{c.difference.value:+.4f} ± {c.difference.standard_error:.4f}"
        table.add_row(c.role, c.name, f"{c.loss.value:.4f} ± {c.loss.standard_error:.4f}", gain)
    out.print(table, highlight=False)
    for name, weights in found.by_group.items():
        label = "weights" if len(found.by_group) == 1 else name
        low, high = min(0.0, float(weights.min())), float(weights.max())
        blocks = sparkline((weights - low) / (high - low))
        out.print(f"{label:<9} {blocks}  {low:+.3f} to {high:+.3f}", highlight=False, markup=False)
        if found.steps is not None:
            schedule = schedule_of(weights)[1:]
            out.print(f"schedule  {sparkline(schedule / max(1.0, float(schedule.max())))}", highlight=False)
        else:
            each = ", ".join(f"{model} {weight:+.3f}" for model, weight in zip(found.names, weights, strict=True))
            out.print(f"          {each}", highlight=False, markup=False)
    if found.steps is not None and len(found.by_group) == 1:
        out.print(f"the learning-rate schedule they equal: {schedule_in_words(found)}", highlight=False)
    if found.decays:
        out.print("what decays of the learned shape would have given:", highlight=False)
        for c in found.decays:
            worse = f"{-c.difference.value:+.4f} ± {c.difference.standard_error:.4f} against the learned weights"
            out.print(f"  {c.name}: {c.loss.value:.4f}, {worse}", highlight=False, markup=False)
