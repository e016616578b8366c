"""Weights learned when a Trainer has finished, from the checkpoints it kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lagless.checkpoints import find_checkpoints
from lagless.lab.learn._documents import Document, Parts, text_documents
from lagless.lab.learn._learn import learn
from lagless.lab.learn._learned import Learned
from lagless.lab.learn._write import write_learned

FOLDER = "learned"


class LearnCallback(TrainerCallback):
    """Learns weights at the end of training, on the checkpoints a ``transformers.Trainer`` kept.

    ``output_dir/learned`` is their sum as a model, as ``lagless learn`` writes it. The Trainer's model stays as it is;
    the sums go through a second one. Keep checkpoints (``save_steps``, and no small ``save_total_limit``).

    Args:
        data: held-out documents: a text file or a data set, as for ``lagless learn --data``, or documents.
        length: of the windows that text is cut into, in tokens.
        options: of :func:`learn`, such as ``modes`` and ``evaluations``.

    Attributes:
        found: what was learned; None before.

    Raises:
        CheckpointError: at the end of training, if too few checkpoints were kept or ``output_dir/learned`` is not free.
        ValueError: as :func:`learn` does.

    >>> callback = LearnCallback("held-out.txt")
    >>> # Trainer(..., callbacks=[callback])
    """

    def __init__(self, data: str | Sequence[Document] | Parts, *, length: int = 512, **options: Any) -> None:
        self.found: Learned | None = None
        self._data, self._length, self._options = data, length, options

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Learn and write, on the first process."""
        if not state.is_world_process_zero:
            return
        run, data = Path(args.output_dir or "."), self._data
        documents = text_documents(data, kwargs["processing_class"], self._length) if isinstance(data, str) else data
        source = find_checkpoints(run)
        write_learned(source, None, run / FOLDER, overwrite=True)  # refuses the folder before the work
        self.found = learn(source, documents, **self._options)
        write_learned(source, self.found, run / FOLDER, overwrite=True)
