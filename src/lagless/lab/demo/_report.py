"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import platform
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import torch

from lagless.lab.demo._plots import Plot
from lagless.lab.demo._results import DemoResult, settings
from lagless.lab.demo._words import caveats, command, findings, python_code, scaled_code

_CSS = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5c5c5c; --back: #ffffff; --box: #f3f4f6; --line: #d5d8dd;
        --good: #00664b; --bad: #b03a00; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --soft: #a8adb5; --back: #17191c; --box: #23262b; --line: #3b4048; --good: #4fd0a5;
          --bad: #ff9d66; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 52rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
p.lead, figcaption, td.note, .small { color: var(--soft); } figcaption, .small { font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.group td { border-bottom: 2px solid var(--soft); }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem 1rem; }
figure { margin: 1rem 0 2rem; } img { width: 100%; background: #fff; border-radius: 6px; box-sizing: border-box;
       padding: .5rem; border: 1px solid var(--line); }
pre { background: var(--box); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .86rem;
      line-height: 1.45; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.pair pre { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: .3rem; }
@media print { body { max-width: none; } figure, table, pre { break-inside: avoid; } }
"""


def write_report(result: DemoResult, plots: Sequence[Plot], folder: Path) -> None:
    """Write ``report.html`` into ``folder``, where the plots are."""
    winner = result.winner
    body = "\n".join(
        [
            "<h1>What averaging does to a training run</h1>",
            _introduction(result),
            "<h2>What was seen</h2>",
            "<p>Averages are compared with the live weights, which are what the last step of training left. Four rules "
            "are compared at the same settings, and each at the best of several. What κ, φ and the other words mean "
            "stands below the table; “clearly” is by more than two standard errors.</p>",
            _list(findings(result)),
            "<h2>In numbers</h2>",
            _table(result),
            _definitions(result),
            "<h2>In curves</h2>",
            *(_figure(plot, folder) for plot in plots),
            "<h2>What the numbers do not say</h2>",
            _list(caveats(result)),
            "<h2>In words</h2>",
            _sample(result),
            f"<h2>Use it in your own training: {escape(winner.label.removeprefix('best '))}</h2>",
            _usage(result),
            "<h2>How this was made</h2>",
            _making(result),
        ]
    )
    (folder / "report.html").write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>lagless demo</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _introduction(result: DemoResult) -> str:
    plan = result.plan
    return (
        '<p class="lead">A small language model '
        f"({result.parameters:,} parameters) was trained from random weights on "
        f"{escape(result.corpus)}: {plan.steps:,} steps of {plan.shape.batch_size} × {plan.shape.length} tokens each. "
        "So few tokens per step make the weights shake from step to step. An average over recent steps shakes less, "
        "but it also trails behind: part of it is from when the model was worse. Rules of averaging differ in how they "
        f"trade the two. {len(result.candidates)} of them followed this one run, all from the same weights.</p>"
    )


def _table(result: DemoResult) -> str:
    head = (
        "rule",
        "settings",
        "test loss",
        "minus live ± s.e.",
        "mean age (steps)",
        "effective iterates",
        f"weight on θ<sub>{result.plan.warmup}</sub>",
    )
    rows = [f"<tr class='group'>{_cells('live', 'no averaging', f'{result.live_loss:.3f}', '', '0', '1', '')}</tr>"]
    for row in result.rows:
        difference, candidate = row.difference, row.candidate
        mark = "" if not difference.clear else "good" if difference.mean < 0 else "bad"
        cells = _cells(
            escape(row.label),
            escape(settings(candidate.rule)),
            f"{row.loss:.3f}",
            f"<span class='{mark}'>{difference}</span>",
            f"{candidate.mean_age:.0f}",
            f"{candidate.effective_iterates:.1f}",
            f"{candidate.weight_on_start:+.3f}",
        )
        group = " class='group'" if row is result.matched_rows[-1] else ""
        rows.append(f"<tr{group}>{cells}</tr>")
    return (
        "<div class='scroll'><table><thead><tr>"
        + "".join(f"<th>{name}</th>" for name in head)
        + "</tr></thead><tbody>"
        + "\n".join(rows)
        + "</tbody></table></div>"
    )


def _cells(*values: str) -> str:
    return "".join(f"<td>{value}</td>" for value in values)


def _definitions(result: DemoResult) -> str:
    plan = result.plan
    terms = {
        "test loss": "cross-entropy, in nats per token: how surprised the model is by the next token of text it has "
        f"never seen, {result.tokens:,} tokens from {result.files} files. Lower is better; "
        f"guessing blindly gives ln {plan.shape.vocab_size} ≈ {_blind(result):.1f}.",
        "minus live ± s.e.": "the loss minus that of the live weights (those of the last step) on the same text, with "
        "its standard error over the held-out files. Coloured where it is more than two standard errors from zero.",
        "mean age": "how many steps the average trails behind the last one: Σ w (T − t) over its weights w. "
        "0 for the live weights; negative if a rule extrapolates.",
        "effective iterates": "how many independent snapshots the average amounts to, 1/Σ w²: the factor by which "
        "the variance of their noise falls, if iterates are independent.",
        f"weight on θ_{plan.warmup}": "how much of the weights at the start of averaging (the end of "
        "warm-up) is left. Negative if a rule subtracts them.",
        "EMA": "exponential moving average, ema ← (1−β) ema + β θ, with β = (ρ + t)^−κ at step t, once "
        "every φ steps. Larger κ or φ: a longer memory. A half-life in steps is another way to set β.",
        "BEMA": "that EMA plus α (θ − θ₀) with α = (ρ + t)^−η: a correction along the way travelled, "
        "that fades as η grows.",
        "OUEMA, DEMA": "the EMA of iterates with part of θ₀ taken out; and twice the EMA minus the EMA of the EMA.",
    }
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return f"<details open><summary>What the words mean</summary><dl>{items}</dl></details>"


def _blind(result: DemoResult) -> float:
    return float(torch.tensor(result.plan.shape.vocab_size, dtype=torch.float32).log())


def _figure(plot: Plot, folder: Path) -> str:
    data = base64.b64encode((folder / plot.file).read_bytes()).decode()
    return (
        f"<figure><h3>{escape(plot.title)}</h3><img alt='{escape(plot.title)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _sample(result: DemoResult) -> str:
    sample, average = result.sample, result.winner.label
    return (
        f"<p>Both models continue the beginning of <code>{escape(sample.source)}</code>, a held-out file, with the "
        "same random numbers. A model this small, trained for minutes, gets the look of the text and not its sense; "
        "a difference of a few hundredths of a nat is not one that you can see in a paragraph.</p>"
        f"<p class='small'>The beginning</p><pre>{escape(sample.prompt)}</pre><div class='pair'>"
        f"<div><p class='small'>live</p><pre>{escape(sample.live)}</pre></div>"
        f"<div><p class='small'>{escape(average)}</p><pre>{escape(sample.average)}</pre></div></div>"
    )


def _usage(result: DemoResult) -> str:
    winner, matched = result.winner, result.row("BEMA")
    from_files = winner if winner.candidate.rule.update_freq % result.plan.interval == 0 else matched
    stored = f"checkpoints every {result.plan.interval} steps"
    return (
        f"<p>The best average on validation text was <b>{escape(winner.label)}</b> "
        f"({escape(settings(winner.candidate.rule))}). This follows it in any PyTorch training loop:</p>"
        f"<pre>{escape(python_code(winner))}</pre>"
        f"<p>Those numbers are for {result.plan.steps:,} steps. In a longer run the same fraction of the run should be "
        "averaged; this gives every iterate at the same fraction of the run the same weight:</p>"
        f"<pre>{escape(scaled_code(result, winner))}</pre>"
        "<p>They were chosen for this model and this text. Follow several rules in one run, as here, and choose on "
        "text of your own.</p>"
        f"<p>A run that is over can be averaged from its checkpoints. This run left {stored}, and this makes "
        f"{escape(from_files.label)} ({escape(settings(from_files.candidate.rule))}) from them, the same model as in "
        f"<code>averages/{escape(from_files.folder)}</code> up to rounding:</p>"
        f"<pre>{escape(command(result, from_files))}</pre>"
        "<p>Each folder in <code>averages/</code> loads as any model does:</p>"
        "<pre>from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{escape(str(result.out / "averages" / winner.folder))}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{escape(str(result.out / "averages" / winner.folder))}")</pre>'
    )


def _making(result: DemoResult) -> str:
    plan, shape, threads = result.plan, result.plan.shape, torch.get_num_threads()
    return _list(
        [
            f"Text: {result.corpus}, split by whole file or piece into 80 % to train on, 10 % to choose settings "
            "(validation) and 10 % to measure (test).",
            f"Tokenizer: byte-level BPE with {shape.vocab_size} tokens, trained on the training files.",
            f"Model: Llama, {shape.layers} layers, width {shape.hidden_size}, {shape.heads} heads, tied embeddings, "
            f"{result.parameters:,} parameters, float32.",
            f"Training: AdamW (betas 0.9 and 0.95, weight decay 0.1), gradients clipped at 1, learning rate "
            f"{plan.learning_rate:g}, constant after a warm-up of {plan.warmup} steps; averaging begins when warm-up "
            "ends.",
            f"Seed {plan.seed}. lagless demo took {result.seconds:.0f} s with Python {platform.python_version()}, "
            f"PyTorch {torch.__version__} on {threads} thread{'s' if threads != 1 else ''}.",
            "metrics.jsonl has every evaluation, demo.json the settings and the table, run/ the checkpoints.",
        ]
    )


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
