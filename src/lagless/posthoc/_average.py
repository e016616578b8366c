"""The calls behind ``lagless average`` and ``lagless inspect``."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lagless.checkpoints import (
    CARD,
    NAMES,
    RECORD,
    ModelWriter,
    StrPath,
    Trajectory,
    absolute_path,
    check_destination,
    find_checkpoints,
    model_card,
    permissions_of,
    plan_layout,
    reporting,
    sidecar_files,
)
from lagless.execution import Ranks
from lagless.posthoc._merged_factors import product_pairs, without, write_products
from lagless.posthoc._recursion import stream_recursion
from lagless.posthoc._weighted_sums import Accumulate, Progress, stream_product
from lagless.rules import (
    Anchor,
    FloatArray,
    Rule,
    anchor,
    common_update_freq,
    default_rule,
    effective_iterates,
    mean_age,
    named_rules,
    rule_to_dict,
    schedule_of,
    ticks,
    trajectory_weights,
)

Rules = Rule | ArrayLike | Mapping[str, Rule | ArrayLike]
"""A rule, or weights of the checkpoints (θ_0's first); or several of them by name."""

_CONFIGURATIONS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class AverageSummary:
    """What a rule does with the stored checkpoints.

    Attributes:
        name: the name the rule was given, ``""`` for a single one.
        rule: the averaging rule; None for weights that were given.
        steps: the step of each checkpoint, θ_0's first.
        weights: the weight of each checkpoint.
        mean_age: how far the average trails behind the last checkpoint, in optimizer steps.
        effective_iterates: how many checkpoints it amounts to against independent noise.
        anchor: the step of the checkpoint at which averaging began (θ_0, or the last one of burn-in), and its weight.
        path: the model folder, for :func:`average_checkpoints`.
        nbytes: the size of the weight files there.
    """

    name: str
    rule: Rule | None
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    mean_age: float
    effective_iterates: float
    anchor: Anchor
    path: Path | None = None
    nbytes: int = 0


@dataclass(frozen=True)
class RunSummary:
    """What is in a run folder.

    Attributes:
        steps: the step of each checkpoint, θ_0's first.
        names: the folder or file name of each checkpoint.
        start_given: whether θ_0 was chosen with ``start``.
        is_adapter: whether these are adapters, and not whole models.
        tensors: tensors per checkpoint.
        parameters: elements of floating-point tensors per checkpoint.
        nbytes: bytes per checkpoint.
        dtypes: elements per type, by type name.
        shards: weight files per checkpoint.
        left_out: names of tensors in the last checkpoint that are no weights, as of an optimizer.
        averages: one summary per rule asked about.
        unit: what steps count: optimizer steps, or epochs.
        quantized: what quantized the weights; None for plain ones.
        written: the types of floating-point tensors that an average is written in by default.
    """

    steps: tuple[int, ...]
    names: tuple[str, ...]
    start_given: bool
    is_adapter: bool
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    shards: int
    left_out: tuple[str, ...]
    averages: tuple[AverageSummary, ...]
    unit: str = "step"
    quantized: str | None = None
    written: str = ""


def average_checkpoints(
    run: StrPath | Sequence[StrPath] | Trajectory,
    rules: Rules | None,
    out: StrPath,
    *,
    start: StrPath | None = None,
    start_step: int | None = None,
    steps: Sequence[int] | None = None,
    at: int | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    memory: int = 2**30,
    accumulate: Accumulate = "float32",
    recursive: bool = False,
    merged_lora: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    dry_run: bool = False,
    group: Any = None,
    remarks: Mapping[str, Any] | None = None,
) -> list[AverageSummary]:
    """Average the checkpoints of a run by one rule or many, in one pass over the files, into models that
    ``from_pretrained`` loads.

    Beside the weights goes what lies beside the last checkpoint's, but states of training and logs,
    ``lagless.json``, which says what the average is made of, and a model card that says so in words. Nobody may read
    more than of the checkpoints.

    Args:
        run: the run folder, or a list of checkpoints; see :func:`lagless.checkpoints.find_checkpoints`, also for
            ``start``, ``start_step``, ``steps``. Or what that function returned, with these three left out.
        rules: one rule, whose average goes to ``out``; or a mapping from names to rules, whose averages go to
            ``out/NAME``. In place of a rule, weights of the checkpoints, θ_0's first, of any sign and summing to 1.
            None for ``EMA(half_life_fraction=0.05)`` with an update at every checkpoint.
        out: the output folder; it appears when everything is written.
        at: average as of this step: later checkpoints are left out.
        dtype: type of the weights written: ``"auto"`` keeps that of the last checkpoint, or float32, bfloat16, float16,
            float64. Rounding an average back to bfloat16 can cost much of what averaging gained; float32 keeps it.
        max_shard_size: largest weight file; an adapter is always one file.
        memory: bytes for buffers.
        accumulate: type to sum in.
        recursive: form averages by the recursion of their rules, checkpoint after checkpoint, in float32 or wider. They
            are those of ``lagless watch``, bit for bit, and those of the weighted sum up to rounding.
        merged_lora: of LoRA adapters, average the products BA and write their nearest factors of the adapter's rank,
            in place of averages of A and of B; ``lagless.json`` says what that rank leaves out.
        overwrite: replace ``out`` if all that it holds was written by lagless.
        allow_nonfinite: average NaN and infinity as they are, instead of refusing them.
        progress: called with the bytes read so far and in all.
        dry_run: check everything that can be checked without reading weights, write nothing.
        group: processes of ``torch.distributed`` that divide the weight files among them, on a file system that all of
            them see. All call this with the same arguments; the result is that of one process, bit for bit.
        remarks: what ``lagless.json`` is to say beside what it always says, such as how weights were found.

    Returns:
        One summary per rule, in the order of ``rules``.

    Raises:
        CheckpointError: if checkpoints are missing, damaged or do not belong together, or the output cannot be written.
        ValueError: if an argument is out of range, or a rule makes no update among the steps.
    """
    out = absolute_path(out)
    trajectory = _opened(run, steps, start, start_step).until(at)
    named = _named(default_rule(update_freq=common_update_freq(trajectory.steps)) if rules is None else rules)
    if recursive and not all(isinstance(rule, Rule) for rule in named.values()):
        raise ValueError("recursive=True forms averages of rules; weights that are given have no recursion.")
    if recursive and merged_lora:
        raise ValueError("merged_lora=True averages products, which have no recursion; leave one of the two out.")
    last = trajectory.checkpoints[-1]
    pairs = product_pairs(last) if merged_lora else {}
    layout = plan_layout(last.written, dtype, max_shard_size, last.is_adapter, last.stem)
    summaries = [
        replace(_summarize(name, rule, trajectory), path=out / name, nbytes=layout.nbytes)
        for name, rule in named.items()
    ]
    with reporting(out):
        check_destination(out, [checkpoint.path for checkpoint in trajectory.checkpoints], overwrite)
    source, permissions = _companions_source(trajectory), permissions_of(trajectory.checkpoints)
    if dry_run:
        return summaries
    weights = np.array([summary.weights for summary in summaries])
    ranks = Ranks(group)
    quantized = last.quantized is not None
    with ModelWriter(out, list(named), layout, source, dtype, ranks, overwrite, permissions, quantized) as writer:
        share = layout.share(ranks.rank, ranks.size)
        common: dict[str, Any] = {"allow_nonfinite": allow_nonfinite, "progress": progress, "ranks": ranks}
        if recursive:
            given = [summary.rule for summary in summaries if summary.rule is not None]
            prints = stream_recursion(trajectory.checkpoints, trajectory.steps, given, writer, names=share, **common)
        else:
            prints = stream_product(
                trajectory.checkpoints,
                weights,
                without([*pairs, *pairs.values()], writer),
                accumulate=accumulate,
                memory=memory,
                names=share,
                **common,
            )
        lost = (
            write_products(trajectory.checkpoints, weights, pairs, writer) if pairs and set(pairs) <= set(share) else []
        )
        how = "recursion" if recursive else accumulate
        records = [{**_record(summary, trajectory, prints, how, dtype), **(remarks or {})} for summary in summaries]
        for record, part in zip(records, lost, strict=bool(lost)):
            record["merged_lora"] = {"layers": len(pairs), "largest_part_left_out": part}
        writer.write_texts(RECORD, [json.dumps(record, indent=2, ensure_ascii=False) + "\n" for record in records])
        folder = source if source.is_dir() else source.parent
        writer.write_texts(CARD, [model_card(record, folder) for record in records])
    if ranks.rank == 0:
        _warn_of_copies(trajectory, prints)
    return summaries


def _opened(
    run: StrPath | Sequence[StrPath] | Trajectory,
    steps: Sequence[int] | None,
    start: StrPath | None,
    start_step: int | None,
) -> Trajectory:
    if not isinstance(run, Trajectory):
        return find_checkpoints(run, steps, start, start_step)
    if steps is not None or start is not None or start_step is not None:
        raise ValueError("steps, start and start_step belong to find_checkpoints, which has opened this run already.")
    return run


def _companions_source(trajectory: Trajectory) -> Path:
    """Where configuration and tokenizer are: beside the last weights or, as these may be bare shards, beside θ_0's."""
    places = [trajectory.checkpoints[-1].companions, trajectory.checkpoints[0].companions]
    named = [{file.name for file in sidecar_files(place)} for place in places]
    return next((p for p, names in zip(places, named, strict=True) if names & {*_CONFIGURATIONS}), places[0])


def _warn_of_copies(trajectory: Trajectory, fingerprints: Sequence[str | None]) -> None:
    """Say that two checkpoints of the run are one, copied; θ_0 may be the same as the first of them."""
    seen: dict[str, int] = {}
    for i in range(1, len(fingerprints)):
        other = seen.setdefault(fingerprints[i] or str(i), i)
        if other != i:
            one, two = (trajectory.checkpoints[k].path for k in (other, i))
            warnings.warn(
                f"{one} and {two} hold the same weights, bit for bit. If one is a copy of the other, it counts twice "
                "in the average: leave it out (--steps).",
                stacklevel=3,
            )
            return


def inspect_run(
    run: StrPath | Sequence[StrPath] | Trajectory,
    rules: Rules | None = None,
    *,
    start: StrPath | None = None,
    start_step: int | None = None,
    steps: Sequence[int] | None = None,
    at: int | None = None,
) -> RunSummary:
    """Say what a run folder holds, and what rules would make of it; no weights are read.

    Args:
        run: as for :func:`average_checkpoints`, and so ``start``, ``start_step``, ``steps`` and ``at``.
        rules: one rule, or a mapping from names to rules, or None.

    Raises:
        CheckpointError: if checkpoints are missing, damaged or do not belong together.
        ValueError: if an argument is out of range, or a rule makes no update among the steps.
    """
    trajectory = _opened(run, steps, start, start_step).until(at)
    last = trajectory.checkpoints[-1]
    dtypes: dict[str, int] = {}
    for info in last.tensors.values():
        dtypes[NAMES[info.dtype]] = dtypes.get(NAMES[info.dtype], 0) + info.numel
    named = {} if rules is None else _named(rules)
    return RunSummary(
        steps=trajectory.steps,
        names=tuple(checkpoint.path.name for checkpoint in trajectory.checkpoints),
        start_given=trajectory.start_given,
        is_adapter=last.is_adapter,
        tensors=len(last.tensors),
        parameters=sum(info.numel for info in last.tensors.values() if info.dtype.is_floating_point),
        nbytes=last.nbytes,
        dtypes=dtypes,
        shards=len(last.files),
        left_out=last.left_out,
        averages=tuple(_summarize(name, rule, trajectory) for name, rule in named.items()),
        unit=trajectory.unit,
        quantized=last.quantized,
        written=", ".join(sorted({NAMES[i.dtype] for i in last.written.values() if i.dtype.is_floating_point})),
    )


def _named(rules: Rules) -> dict[str, Rule | ArrayLike]:
    if not isinstance(rules, Mapping):
        return {"": rules}
    named: dict[str, Rule | ArrayLike] = dict(rules)
    checked = {name: rule for name, rule in named.items() if isinstance(rule, Rule)}
    named_rules(checked or (default_rule() if named else checked))
    for name in named:
        if not name or name.startswith(".") or os.sep in name or "/" in name or name == RECORD:
            raise ValueError(
                f"rules: {name!r} cannot be the name of a folder. Choose a name without '/' that does not begin with "
                "a dot."
            )
    return named


def _summarize(name: str, rule: Rule | ArrayLike, trajectory: Trajectory) -> AverageSummary:
    start, *later = steps = trajectory.steps
    if not isinstance(rule, Rule):
        given = _checked_weights(name, rule, steps)
        age, count = mean_age(given, steps), effective_iterates(given)
        return AverageSummary(name, None, steps, tuple(given.tolist()), age, count, Anchor(start, float(given[0])))
    if next(ticks(rule, steps), None) is None:
        shown = ", ".join(map(str, later[:8])) + (", ..." if len(later) > 8 else "")
        raise ValueError(
            f"{name or type(rule).__name__}: update_freq={rule.update_freq}, update_after={rule.update_after} give no "
            f"update at the stored steps {shown} (θ_0 is step {start}). {_remedy(rule, steps)}"
        )
    weights = trajectory_weights(rule, steps)
    return AverageSummary(
        name,
        rule,
        steps,
        tuple(weights.tolist()),
        mean_age(weights, steps),
        effective_iterates(weights),
        anchor(rule, steps),
    )


def _checked_weights(name: str, weights: ArrayLike, steps: Sequence[int]) -> FloatArray:
    """Return weights as an array, one for each checkpoint.

    Raises:
        ValueError: if there are more or fewer, one is not finite, or they do not sum to 1.
    """
    what = f"the weights of {name!r}" if name else "the weights"
    try:
        given = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} are {weights!r:.60}; give a rule, or one number for each checkpoint.") from None
    if given.shape != (len(steps),):
        raise ValueError(
            f"{what} have shape {given.shape}; it must be ({len(steps)},), one for each checkpoint, at steps "
            f"{', '.join(map(str, steps[:8]))}{', ...' if len(steps) > 8 else ''} (θ_0 is step {steps[0]})."
        )
    if not np.isfinite(given).all():
        place = int(np.flatnonzero(~np.isfinite(given))[0])
        raise ValueError(f"{what}: {given[place]} at step {steps[place]}; weights must be finite.")
    if not abs(given.sum() - 1.0) <= 1e-6:
        raise ValueError(
            f"{what} sum to {given.sum():.9g}; they must sum to 1. Divide them by their sum (--normalize), or correct "
            "them."
        )
    return given


def _remedy(rule: Rule, steps: Sequence[int]) -> str:
    if rule.update_after >= steps[-1]:
        return f"Choose update_after below the last step, {steps[-1]}."
    return f"Choose an update_freq that divides them, e.g. {common_update_freq(steps, rule.update_after)}."


def _record(
    summary: AverageSummary, trajectory: Trajectory, fingerprints: Sequence[str | None], accumulate: str, dtype: str
) -> dict[str, Any]:
    """What ``lagless.json`` says. Names only, no paths: the record travels with the model."""
    from lagless._version import __version__

    start = trajectory.checkpoints[0]
    return {
        "lagless": __version__,
        "name": summary.name,
        "rule": summary.rule and rule_to_dict(summary.rule),
        "start": {
            "name": start.path.absolute().name,
            "step": trajectory.steps[0],
            "chosen": "given" if trajectory.start_given else "earliest checkpoint",
        },
        "step": trajectory.steps[-1],
        "mean_age": summary.mean_age,
        "effective_iterates": summary.effective_iterates,
        "equivalent_schedule": schedule_of(summary.weights).tolist(),
        "anchor": {
            "name": trajectory.checkpoints[trajectory.steps.index(summary.anchor.step)].path.absolute().name,
            "step": summary.anchor.step,
            "weight": summary.anchor.weight,
        },
        "sources": [
            {
                "name": checkpoint.path.absolute().name,
                "step": step,
                "weight": weight,
                "files": [file.name for file in checkpoint.files],
                "fingerprint": fingerprint,
            }
            for checkpoint, step, weight, fingerprint in zip(
                trajectory.checkpoints, trajectory.steps, summary.weights, fingerprints, strict=True
            )
        ],
        "accumulate": accumulate,
        "dtype": dtype,
    }
