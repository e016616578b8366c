"""How models are to be evaluated, and what does it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lagless.watch._measured import Measured
from lagless.watch._snapshot import Snapshot


class EvaluationError(Exception):
    """An evaluation failed; the message says how."""


class Evaluate(Protocol):
    """Measures one model after another.

    Attributes:
        in_memory: whether it reads averages itself; else it is given a model folder.
    """

    in_memory: bool

    def __call__(self, snapshot: Snapshot, name: str, folder: Path | None, /) -> Measured:
        """Measure the average of a rule, or with ``"live"`` the checkpoint.

        Raises:
            EvaluationError: if that fails.
        """
        ...


@dataclass(frozen=True)
class HeldOutPlan:
    """What to measure, and on what.

    Attributes:
        data: held-out text, problems or conversations for the loss; None for none.
        tasks: of :data:`lagless.lab.evaluation.TASKS`, beside the loss.
        task_data: by task, a file in place of its data set on the hub.
        sequences: of the loss at most.
        length: tokens of each at most.
        prompts: per task.
        samples: responses per prompt.
        batch_size: sequences or responses at a time.
        device: None for an accelerator if there is one.
        dtype: of the weights in memory.
        seed: of what is chosen and sampled.
    """

    data: str | None
    tasks: tuple[str, ...] = ()
    task_data: tuple[tuple[str, str], ...] = ()
    sequences: int = 200
    length: int = 512
    prompts: int | None = 32
    samples: int = 4
    batch_size: int = 8
    device: str | None = None
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class CommandPlan:
    """A command that measures.

    Attributes:
        command: its words; it gets a model folder and prints JSON.
        timeout: seconds after which it is ended.
    """

    command: str
    timeout: float = 3600.0
