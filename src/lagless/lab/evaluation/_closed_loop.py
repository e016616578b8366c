"""Closed-loop accuracy through lm-evaluation-harness: what a model writes itself is what it goes on from."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lagless.lab.statistics import Mean, paired_difference

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

TASK_FOLDER = Path(__file__).parent / "tasks"
TASKS = ("boolq", "gsm8k", "mmlu_hs", "arithmetic")

_PREFIX = "lagless_"


@dataclass(frozen=True)
class Score:
    """What a model scored on a task.

    Attributes:
        mean: the accuracy: the share of responses that are right, per prompt, averaged over prompts (for MMLU over
            prompts, then subjects), and its standard error over prompts.
        answered: the share of responses in which an answer was found.
        prompts: by prompt, the share of responses that are right; named ``"task/row"``, row of the data.
        parts: accuracy per subject, for MMLU.
        truncated: how many prompts were too long for the model's context and lost their beginning; None if the backend
            does not tell.
    """

    mean: Mean
    answered: float
    prompts: Mapping[str, float]
    parts: Mapping[str, float]
    truncated: int | None

    def difference(self, reference: Score) -> Mean:
        """This accuracy minus the ``reference``'s, with the standard error of the pairs.

        Raises:
            ValueError: if they are not on the same prompts.
        """
        return paired_difference(self.prompts, reference.prompts)


class ClosedLoop:
    """Tasks that are ready to be put to any number of models: the prompts are read and chosen once.

    Args:
        tasks: of :data:`TASKS`.
        data: by task, the file or hub name to read instead of the original data set.
        prompts: how many, for MMLU per subject; None for those of the paper (64 for BoolQ and per subject, 128 else).
        samples: responses per prompt, at temperature 1.
        seed: of the choice of prompts and of the sampling.
        level: of arithmetic.
        max_new_tokens: the most that a response may have; None for the task's own.
        chat: put prompts through the tokenizer's chat template.

    Raises:
        ImportError: without the extra ``eval``.
        ValueError: if a task is unknown, or data do not fit.

    Reference:
        The protocol of Block and Zhang, *EMA Without the Lag*, arXiv 2508.00180, Section 5.1 and App. C. Their prompts'
        wording and choice are not published; these are ours.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        data: Mapping[str, str] | None = None,
        *,
        prompts: int | None = None,
        samples: int = 50,
        seed: int = 0,
        level: int = 1,
        max_new_tokens: int | None = None,
        chat: bool = False,
    ) -> None:
        require_harness()
        data = dict(data or {})
        for name in (*tasks, *data):
            if name not in TASKS:
                raise ValueError(f"task {name!r} is unknown; there are {', '.join(TASKS)}.")
        if samples < 1:
            raise ValueError(f"samples={samples}; it must be at least 1.")
        self.samples, self._seed, self._chat = samples, seed, chat
        self._tasks: dict[str, Task | Group] = {}
        self._leaves: dict[str, Task] = {}
        settings = {"seed": seed, "level": level} | ({} if prompts is None else {"prompts": prompts})
        for name in tasks:
            source = {"data": data[name]} if name in data else {}
            self._load(name, settings | source, max_new_tokens)

    def _load(self, name: str, metadata: dict[str, Any], max_new_tokens: int | None) -> None:
        from lm_eval.tasks import TaskManager

        with _quiet():
            manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata)
            loaded = manager.load([_PREFIX + name])
        for task in loaded["tasks"].values():
            task.set_config("repeats", self.samples)
            if max_new_tokens is not None:
                task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
        self._leaves |= loaded["tasks"]
        self._tasks[name] = loaded.get("groups", {}).get(_PREFIX + name) or loaded["tasks"][_PREFIX + name]

    def __call__(self, lm: LM) -> dict[str, Score]:
        """The scores of a model of the harness, by task; make one with :func:`hf_model` or ``vllm_model``.

        Raises:
            ValueError: if prompts are to go through a chat template that the tokenizer does not have.
        """
        from lm_eval.api.group import Group
        from lm_eval.evaluator import evaluate

        if self._chat and not getattr(getattr(lm, "tokenizer", None), "chat_template", None):
            raise ValueError("chat: the model's tokenizer has no chat template; evaluate without one.")
        groups = {task.name: task for task in self._tasks.values() if isinstance(task, Group)}
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with _quiet(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed)
            found: Any = evaluate(
                lm,
                {"tasks": self._leaves, "groups": groups},
                apply_chat_template=self._chat,
                bootstrap_iters=1,  # enough to be told the standard error of a mean, which has a formula
            )
        return {name: _score(task, found, lm) for name, task in self._tasks.items()}


def hf_model(model: Any, tokenizer: Any, batch_size: int = 64) -> LM:
    """A ``transformers`` model, in memory, for :class:`ClosedLoop`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        batch_size: responses at a time.
    """
    require_harness()
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[call-arg]


def require_harness() -> None:
    """Refuse to go on without the packages of the extra ``eval``."""
    for module in ("lm_eval", "transformers", "datasets"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"closed-loop evaluation needs {module}: pip install 'lagless[eval]'")


def _score(task: Task | Group, found: Any, lm: LM) -> Score:
    from lm_eval.api.group import Group

    name = task.name if isinstance(task, Group) else task.task_name
    leaves: list[Any] = task.get_all_tasks() if isinstance(task, Group) else [task]
    totals, prompts = found["results"][name], {}
    for leaf in leaves:
        short = leaf.task_name.rpartition("::")[2].removeprefix(_PREFIX)
        prompts |= {f"{short}/{record['doc']['id']}": record["accuracy"] for record in found["samples"][leaf.task_name]}
    spread = totals["accuracy_stderr,responses"]
    return Score(
        mean=Mean(
            totals["accuracy,responses"], float("nan") if isinstance(spread, str) else float(spread), len(prompts)
        ),
        answered=totals["answered,responses"],
        prompts=prompts,
        parts={
            leaf.task_name.rpartition("::")[2]: found["results"][leaf.task_name]["accuracy,responses"]
            for leaf in leaves
            if len(leaves) > 1
        },
        truncated=_truncated(leaves, lm),
    )


def _truncated(tasks: list[Any], lm: LM) -> int | None:
    """How many prompts do not fit into the context together with a response; the harness cuts them without a word."""
    tok_encode, max_length = getattr(lm, "tok_encode", None), getattr(lm, "max_length", None)
    if tok_encode is None or max_length is None:
        return None
    room = {id(task): max_length - task.config.generation_kwargs["max_gen_toks"] for task in tasks}
    return sum(len(tok_encode(request.args[0])) > room[id(task)] for task in tasks for request in task.instances)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from logging what is as intended (models in memory, data of our own)."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
