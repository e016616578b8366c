"""What ``lagless evaluate`` does: models, checkpoints of runs and averages of them, put to the same tasks."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lagless.checkpoints import Trajectory, find_checkpoints, holds_weights
from lagless.lab.averages import LIVE, evaluate_averages, load_model
from lagless.lab.cross_entropy import IGNORED
from lagless.lab.environment import commit, machine, versions
from lagless.lab.evaluation import (
    TASKS,
    ClosedLoop,
    Losses,
    Oscillation,
    Score,
    Sequences,
    held_out_sequences,
    hf_model,
    oscillation,
    sequence_losses,
    served,
)
from lagless.lab.output import write_json
from lagless.lab.statistics import Mean
from lagless.posthoc import average_checkpoints
from lagless.rules import Rule

LOSS = "loss"
TRAIN, VALIDATION = "recipe:train", "recipe:validation"
"""The data that a run of ``lagless train`` was trained on, and those that it held out."""

_CHECKPOINT = re.compile(r"(checkpoint|ckpt|global_?step|step|iter(ation)?)[-_=]?\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class EvaluationPlan:
    """What to evaluate models on, and how.

    Attributes:
        tasks: ``"loss"`` and those of :data:`lagless.lab.evaluation.TASKS`.
        data: by task, a file or the name of a data set on the hub. The loss needs one, or for runs of ``lagless train``
            :data:`TRAIN` or :data:`VALIDATION`: the run's own data, with the tokens that its training counted.
        prompts: per task (MMLU: per subject); None for the paper's.
        samples: responses per prompt.
        sequences: held-out sequences of the loss.
        length: tokens of each at most.
        seed: of all that is chosen or sampled.
        level: of arithmetic.
        max_new_tokens: of a response; None for the task's own.
        chat: put prompts through the chat template.
        backend: of the harness; vLLM reads models from disk.
        batch_size: sequences or responses at a time.
        dtype: of the weights in memory; None for float32 with ``"hf"`` and for the checkpoints' own with ``"vllm"``.
        device: None for an accelerator if there is one.
        engine: arguments of vLLM's engine, such as ``gpu_memory_utilization``.
        split: of a data set on the hub for the loss; None for test, or where there is none, the 1 % of train that
            recipes hold out.
    """

    tasks: tuple[str, ...]
    data: Mapping[str, str]
    prompts: int | None = None
    samples: int = 50
    sequences: int = 200
    length: int = 512
    seed: int = 0
    level: int = 1
    max_new_tokens: int | None = None
    chat: bool = False
    backend: Literal["hf", "vllm"] = "hf"
    batch_size: int = 16
    dtype: str | None = None
    device: str | None = None
    engine: Mapping[str, int | float] = field(default_factory=dict)
    split: str | None = None

    def __post_init__(self) -> None:
        for task in (*self.tasks, *self.data):
            if task not in (LOSS, *TASKS):
                raise ValueError(f"task {task!r} is unknown; there are {', '.join((LOSS, *TASKS))}.")
        if not self.tasks:
            raise ValueError(f"tasks: none is given; there are {', '.join((LOSS, *TASKS))}.")
        if unused := [task for task in self.data if task not in self.tasks]:
            raise ValueError(f"data are given for {unused[0]}, which is not among the tasks {', '.join(self.tasks)}.")
        if LOSS in self.tasks and LOSS not in self.data:
            raise ValueError("the loss needs held-out data: give a file, or the name of a data set on the hub.")
        if LOSS in self.tasks and self.backend == "vllm":
            raise ValueError("backend='vllm' only generates; evaluate the loss with backend='hf'.")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}; it must be float32, bfloat16 or float16.")
        if self.engine and self.backend != "vllm":
            raise ValueError(f"{', '.join(self.engine)} are settings of vLLM's engine; give backend='vllm' too.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the weights in memory, of the backend ``"hf"``."""
        return getattr(torch, self.dtype or "float32")


@dataclass(frozen=True)
class Row:
    """One model on all tasks.

    Attributes:
        name: of the model, checkpoint or average.
        step: of a checkpoint, or as of which an average was formed.
        results: by task.
    """

    name: str
    step: int | None
    results: Mapping[str, Losses | Score]


class Evaluator:
    """The tasks of a plan, ready for any number of models with one tokenizer.

    Args:
        plan: what to evaluate on.
        tokenizer: of the models.
        run: the run that the models are of, for its own data.

    Raises:
        ValueError: if data are missing or do not fit.
    """

    def __init__(self, plan: EvaluationPlan, tokenizer: Any, run: Path | None = None) -> None:
        self._plan, self._tokenizer = plan, tokenizer
        closed = [task for task in plan.tasks if task != LOSS]
        self._sequences: Sequences | None = None
        self._closed_loop: ClosedLoop | None = None
        if LOSS in plan.tasks:
            self._sequences = _loss_sequences(plan, tokenizer, run)
        if closed:
            self._closed_loop = ClosedLoop(
                closed,
                {task: source for task, source in plan.data.items() if task != LOSS},
                prompts=plan.prompts,
                samples=plan.samples,
                seed=plan.seed,
                level=plan.level,
                max_new_tokens=plan.max_new_tokens,
                chat=plan.chat,
            )

    def __call__(self, model: Any) -> dict[str, Losses | Score]:
        """The results of a model in memory."""
        results: dict[str, Losses | Score] = {}
        if self._sequences is not None:
            results[LOSS] = sequence_losses(model, self._sequences, self._plan.batch_size)
        if self._closed_loop is not None:
            results |= self._closed_loop(hf_model(model, self._tokenizer, self._plan.batch_size))
        return results

    def stored(self, folder: Path) -> dict[str, Losses | Score]:
        """The results of a stored model, by the plan's backend."""
        if self._plan.backend == "vllm":
            assert self._closed_loop is not None  # the plan has checked that there is no loss
            with served(folder, self._plan.seed, dtype=self._plan.dtype or "auto", **self._plan.engine) as lm:
                return dict(self._closed_loop(lm))
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self._plan.torch_dtype)
        return self(model.eval().to(self._plan.device or torch.accelerator.current_accelerator() or "cpu"))


def _loss_sequences(plan: EvaluationPlan, tokenizer: Any, run: Path | None) -> Sequences:
    data = plan.data[LOSS]
    if data not in (TRAIN, VALIDATION):
        return held_out_sequences(
            data, tokenizer, length=plan.length, count=plan.sequences, seed=plan.seed, split=plan.split
        )
    if run is None:
        raise ValueError(f"data={data!r} are those of a run of lagless train; give its folder first.")
    from lagless.lab.training import counted_sequences

    found = counted_sequences(run, "train" if data == TRAIN else "validation", plan.sequences)
    tokens = torch.zeros(len(found), max(len(ids) for ids, _ in found), dtype=torch.long)
    labels = torch.full_like(tokens, IGNORED)
    for row, (ids, counted) in enumerate(found):
        own = torch.tensor(ids, dtype=torch.int64)
        tokens[row, : len(ids)] = own
        labels[row, : len(ids)] = torch.where(torch.tensor(counted, dtype=torch.bool), own, IGNORED)
    return Sequences(tokens, labels)


def evaluate_models(
    sources: Sequence[Path],
    plan: EvaluationPlan,
    rules: Callable[[Trajectory], Mapping[str, Rule]] | None = None,
    at: Sequence[int] | Literal["all"] | None = None,
) -> Iterator[Row]:
    """Evaluate models, folders of models, and runs, one after another.

    Args:
        sources: model folders, folders that hold model folders, and run folders.
        plan: the tasks.
        rules: the rules by which to average a run. None: its checkpoints are evaluated as they are.
        at: the steps of a run at which to evaluate, ``"all"`` for every checkpoint; by default the last with ``rules``,
            and all without.

    Yields:
        One row per model, checkpoint or average.

    Raises:
        CheckpointError: if a run is damaged.
        ValueError: if a folder holds no model, its tokenizer is missing or differs from the first one's, or ``rules``
            are given without a run.
    """
    evaluator, vocabulary = None, None
    for source, folders in [(source, _models(source)) for source in sources]:
        trajectory = find_checkpoints(source) if folders is None else None
        tokenizer = load_tokenizer(trajectory.checkpoints[-1].folder if trajectory else (folders or [source])[0])
        if evaluator is None:
            run = None if trajectory is None else source
            evaluator, vocabulary = Evaluator(plan, tokenizer, run), tokenizer.get_vocab()
        elif tokenizer.get_vocab() != vocabulary:
            raise ValueError(f"{source}: its tokenizer is not the one of {sources[0]}; evaluate them apart.")
        if trajectory is None:
            if rules is not None:
                raise ValueError(f"{source} is no run with checkpoints that could be averaged; leave the rule out.")
            yield from (Row(folder.name, None, evaluator.stored(folder)) for folder in folders or ())
        else:
            yield from _of_run(trajectory, evaluator, plan, rules, at)


def _of_run(
    trajectory: Trajectory,
    evaluator: Evaluator,
    plan: EvaluationPlan,
    rules: Callable[[Trajectory], Mapping[str, Rule]] | None,
    at: Sequence[int] | Literal["all"] | None,
) -> Iterator[Row]:
    steps = trajectory.steps if at == "all" or (at is None and rules is None) else at
    named = {} if rules is None else rules(trajectory)
    if plan.backend == "vllm":
        yield from _stored(trajectory, evaluator, plan, named, trajectory.steps[-1:] if steps is None else steps)
        return
    model = load_model(trajectory.checkpoints[-1], plan.device, plan.torch_dtype)
    for found in evaluate_averages(trajectory, named, evaluator, at=steps, model=model):
        yield Row(found.name, found.step, found.result)


def _stored(
    trajectory: Trajectory, evaluator: Evaluator, plan: EvaluationPlan, rules: Mapping[str, Rule], steps: Sequence[int]
) -> Iterator[Row]:
    """Evaluate checkpoints, and averages that are written to a temporary folder one at a time."""
    if trajectory.checkpoints[-1].is_adapter:
        raise ValueError(
            f"{trajectory.checkpoints[-1].path} is an adapter, which vLLM serves beside its base model only. Merge "
            "adapters into the base model first (merge_and_unload of peft), and evaluate those."
        )
    folders = dict(zip(trajectory.steps, (checkpoint.folder for checkpoint in trajectory.checkpoints), strict=True))
    if unknown := [step for step in steps if step not in folders]:
        raise ValueError(f"at={unknown[0]}: the run has checkpoints at {', '.join(map(str, folders))}.")
    for step in steps:
        yield Row(LIVE, step, evaluator.stored(folders[step]))
        for name, rule in rules.items():
            with tempfile.TemporaryDirectory(prefix="lagless-") as place:
                average_checkpoints(trajectory, rule, Path(place) / name, at=step, dtype=plan.dtype or "auto")
                yield Row(name, step, evaluator.stored(Path(place) / name))


def swings(rows: Sequence[Row], samples: int) -> dict[str, dict[str, Oscillation]]:
    """The oscillation of closed-loop accuracy, by name and task, of what was evaluated at two steps or more."""
    found: dict[str, dict[str, Oscillation]] = {}
    for name in dict.fromkeys(row.name for row in rows if row.step is not None):
        own = sorted((row for row in rows if row.name == name and row.step is not None), key=lambda row: row.step or 0)
        for task in own[0].results:
            scores = [result for row in own if isinstance(result := row.results[task], Score)]
            if len(scores) > 1 and samples > 1:
                accuracies = [list(score.prompts.values()) for score in scores]
                found.setdefault(name, {})[task] = oscillation(accuracies, samples)
    return found


def write_results(path: Path, plan: EvaluationPlan, rows: Sequence[Row]) -> None:
    """Write all results as JSON, differences being to the first row, at once or not at all."""
    record = {
        "format": 1,
        "plan": asdict(plan),
        "rows": [_record(row, rows[0]) for row in rows],
        "oscillation": {
            name: {task: asdict(value) for task, value in tasks.items()}
            for name, tasks in swings(rows, plan.samples).items()
        },
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    write_json(path, record)


def _record(row: Row, reference: Row) -> dict[str, Any]:
    def one(task: str, result: Losses | Score) -> dict[str, Any]:
        record: dict[str, Any] = {"metric": "loss" if task == LOSS else "accuracy", **asdict(result.mean)}
        if row is not reference:
            record["difference"] = asdict(difference(result, reference.results[task]))
        if isinstance(result, Score):
            record |= {
                "answered": result.answered,
                "truncated": result.truncated,
                "parts": dict(result.parts),
                "prompts": dict(result.prompts),
            }
        return record

    return {
        "name": row.name,
        "step": row.step,
        "results": {task: one(task, result) for task, result in row.results.items()},
    }


def difference(result: Losses | Score, reference: Losses | Score) -> Mean:
    """The paired difference of two results of one task."""
    return result.difference(reference)  # type: ignore[arg-type]


def _models(source: Path) -> list[Path] | None:
    """The model folders that ``source`` is or holds; None if it is a run."""
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; give a model, a folder of models, or a run.")
    if holds_weights(source):
        return [source]
    folders = [folder for folder in sorted(source.iterdir()) if folder.is_dir() and holds_weights(folder)]
    if any(_CHECKPOINT.match(folder.name) for folder in folders):
        return None
    if not folders:
        raise ValueError(f"{source} holds no model weights; give a model, a folder of models, or a run.")
    return folders


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no tokenizer that loads ({error}); save one beside the weights.") from error
