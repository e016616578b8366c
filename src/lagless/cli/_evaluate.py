"""``lagless evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from lagless.cli._console import err, out
from lagless.cli._evaluation_options import BatchSize, Device, Length, Output, Seed, Sequences, check_output, require
from lagless.cli._rule_options import Grid, RuleNames, chosen_rules, integers, require_rule, rule_options

if TYPE_CHECKING:
    from lagless.lab.evaluate import Row

Data = Annotated[
    list[str],
    typer.Option(
        metavar="[TASK=]SOURCE",
        help="File or hub data set for a task; may be repeated. Without it tasks read their data set from the hub. For "
        "the loss of a run of lagless train also recipe:train or recipe:validation.",
    ),
]
Tasks = Annotated[list[str], typer.Option(help="loss, boolq, gsm8k, mmlu_hs, arithmetic; may be repeated.")]


@rule_options
def evaluate(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL_OR_RUN...", help="Models, folders of models, run folders.")
    ],
    settings: dict[str, Any],
    task: Tasks = ["loss"],  # noqa: B006 (typer copies it)
    data: Data = [],  # noqa: B006
    rule: RuleNames = [],  # noqa: B006
    grid: Grid = [],  # noqa: B006
    at: Annotated[
        list[str],
        typer.Option(help="Steps of a run, e.g. 100,200, or all; may be repeated. Default: all; with --rule the last."),
    ] = [],  # noqa: B006
    output: Output = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts per task or subject. Default: 128, 64 or 64.")] = None,
    samples: Annotated[int, typer.Option(help="Responses per prompt, at temperature 1.")] = 50,
    sequences: Sequences = 200,
    length: Length = 512,
    level: Annotated[int, typer.Option(help="Difficulty of the arithmetic task, 1 to 3.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of a response. Default: the task's.")] = None,
    chat: Annotated[bool, typer.Option(help="Put prompts through the tokenizer's chat template.")] = False,
    split: Annotated[
        str | None,
        typer.Option(help="Split of a hub data set for the loss. Default: test, or the 1 % of train that is held out."),
    ] = None,
    backend: Annotated[Literal["hf", "vllm"], typer.Option(help="What generates.")] = "hf",
    batch_size: BatchSize = 16,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16. Default: float32; under vLLM the checkpoints' own."),
    ] = None,
    device: Device = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Share of each GPU's memory that vLLM may take.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="vLLM's longest prompt with response, in tokens.")
    ] = None,
    tensor_parallel: Annotated[int | None, typer.Option(min=1, help="GPUs that vLLM divides a model among.")] = None,
    seed: Seed = 0,
) -> None:
    """Evaluate models, checkpoints, and averages of a run in memory: held-out loss and closed-loop accuracy.

    With --rule, averages of a run are evaluated in memory, or under vLLM from a temporary folder, one after another.
    Differences are to the first row, paired.
    """
    require("evaluate")
    from lagless.lab.evaluate import EvaluationPlan, evaluate_models, swings, write_results

    require_rule(rule, settings, grid)
    check_output(output)
    plan = EvaluationPlan(
        tuple(dict.fromkeys(task)),
        _sources(data, task),
        prompts,
        samples,
        sequences,
        length,
        seed,
        level,
        max_new_tokens,
        chat,
        backend,
        batch_size,
        dtype,
        device,
        {
            name: value
            for name, value in (
                ("gpu_memory_utilization", gpu_memory),
                ("max_model_len", max_model_len),
                ("tensor_parallel_size", tensor_parallel),
            )
            if value is not None
        },
        split,
    )
    rows: list[Row] = []
    choose = (lambda trajectory: chosen_rules(trajectory.steps, rule, settings, grid)) if rule else None
    for row in evaluate_models(models, plan, choose, _steps(at)):
        rows.append(row)
        err.print(f"evaluated {_label(row)}", highlight=False, markup=False)
    _print_rows(rows)
    for name, by_task in swings(rows, samples).items():
        for found, value in by_task.items():
            out.print(
                f"{name}: {found} moves by {value.step:.4f} from checkpoint to checkpoint (rms, sampling noise of "
                f"{value.noise:.4f} taken off; jitter about a straight curve {value.jitter:.4f})",
                highlight=False,
                markup=False,
            )
    if output is not None:
        write_results(output, plan, rows)
        out.print(f"written to {output}", highlight=False, markup=False)


def _steps(at: list[str]) -> list[int] | Literal["all"] | None:
    """Return the steps of all ``--at``, each once."""
    if "all" in at:
        return "all"
    return list(dict.fromkeys(step for item in at for step in integers("--at", item) or ())) or None


def _sources(data: list[str], tasks: list[str]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for item in data:
        name, equals, source = item.partition("=")
        if not equals and len(set(tasks)) > 1:
            raise ValueError(f"--data {item!r}; with several tasks say which it is for: --data {tasks[0]}={item}.")
        found[name if equals else tasks[0]] = source if equals else item
    return found


def _label(row: Row) -> str:
    return row.name if row.step is None else f"{row.name} at {row.step}"


def _print_rows(rows: list[Row]) -> None:
    from lagless.lab.evaluate import difference
    from lagless.lab.evaluation import Score

    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for task in rows[0].results:
        table.add_column(task, justify="right")
        table.add_column("difference", justify="right")
    for row in rows:
        cells: list[str] = []
        for task, result in row.results.items():
            cells.append(f"{result.mean.value:.4f} ± {result.mean.standard_error:.4f}")
            paired = difference(result, rows[0].results[task])
            cells.append("" if row is rows[0] else f"{paired.value:+.4f} ± {paired.standard_error:.4f}")
        table.add_row(_label(row), *cells)
    out.print(table, highlight=False)
    for task, result in rows[0].results.items():
        if isinstance(result, Score) and result.truncated:
            out.print(
                f"note: {task}: {result.truncated} of {len(result.prompts)} prompts are longer than the model's "
                "context and lose their beginning",
                highlight=False,
                markup=False,
            )
