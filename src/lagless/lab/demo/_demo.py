"""The demo as one call."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path

import torch
from rich.console import Console

from lagless._version import __version__
from lagless.checkpoints import atomic_folder
from lagless.lab.demo._plan import Plan, Shape
from lagless.lab.demo._results import DemoResult
from lagless.lab.output import check_output
from lagless.rules import rule_to_dict

RECORD = "demo.json"
# A model this small gains nothing from more, and numbers depend on how many there are.
_THREADS = 2
_NEEDED = ("transformers", "tokenizers", "matplotlib")


def run_demo(
    out: str | PathLike[str],
    *,
    steps: int = Plan.steps,
    seed: int = Plan.seed,
    data: Sequence[str | PathLike[str]] | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    shape: Shape | None = None,
) -> DemoResult:
    """Train a small Llama from scratch, follow many averages of it, and report how each does on held-out text.

    Runs on the CPU, in about three minutes on two cores, and downloads nothing. The same arguments give the same
    numbers on the same machine.

    Args:
        out: the folder to make: ``report.html``, plots, ``metrics.jsonl``, ``run/checkpoint-N``, ``averages/NAME``. It
            appears when everything is written.
        steps: optimizer steps; all intervals shrink and grow with it.
        seed: of the initial weights and the order of the data.
        data: text files to train on; None for the standard library of the running Python.
        overwrite: replace ``out`` if an earlier demo wrote it.
        console: where progress and the table go; None for standard output.
        shape: the size of the model and its batches.

    Raises:
        ValueError: if there are too few steps or too little text, or ``out`` cannot be used.
        ImportError: if a package that only the demo needs is missing.
    """
    out = Path(out).expanduser()
    plan = Plan(steps=steps, seed=seed, shape=shape or Shape())
    check_output(out, overwrite, [RECORD], "the demo")
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install 'lagless[lab]'")

    # Loaded here: the rest of the library, and the help of the command line, do without these packages.
    from transformers.utils import logging

    from lagless.lab.demo._data import load_corpus
    from lagless.lab.demo._plots import draw_plots
    from lagless.lab.demo._progress import Display
    from lagless.lab.demo._report import write_report
    from lagless.lab.demo._study import run_study
    from lagless.lab.demo._table import print_result

    console = console or Console()
    corpus = load_corpus(data)
    bars, threads = logging.is_progress_bar_enabled(), torch.get_num_threads()
    logging.disable_progress_bar()  # one bar per saved checkpoint would tear ours apart
    torch.set_num_threads(min(threads, _THREADS))
    try:
        with atomic_folder(out) as folder:
            result = run_study(plan, corpus, folder, out, Display(console))
            with Display(console).task("drawing plots, writing the report"):
                plots = draw_plots(result, folder)
                write_report(result, plots, folder)
                _write_record(result, folder)
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()
    print_result(result, console)
    return result


def _write_record(result: DemoResult, folder: Path) -> None:
    """The settings and the table, for programs."""
    rows = [
        {
            "label": row.label,
            "folder": f"averages/{row.folder}",
            "rule": rule_to_dict(row.candidate.rule),
            "test_loss": row.loss,
            "difference_to_live": asdict(row.difference),
            "mean_age": row.candidate.mean_age,
            "effective_iterates": row.candidate.effective_iterates,
            "weight_on_start": row.candidate.weight_on_start,
        }
        for row in result.rows
    ]
    record = {
        "lagless": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "plan": asdict(result.plan),
        "corpus": result.corpus,
        "parameters": result.parameters,
        "seconds": result.seconds,
        "live_test_loss": result.live_loss,
        "rows": rows,
        "bema_minus_ema": {"matched": asdict(result.matched), "best": asdict(result.best)},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
