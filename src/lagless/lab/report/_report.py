"""A study's report: one HTML page that needs nothing beside it, and a Markdown table."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from os import PathLike
from pathlib import Path

from lagless.lab.output import write_text
from lagless.lab.report._compare import Finding, Side, compare
from lagless.lab.report._figures import draw
from lagless.lab.report._study import Setting, Study
from lagless.lab.statistics import LEVEL, Verdict

RULE = (
    "The rule, fixed before the runs: each side's setting is chosen by the score named for it, averaged over seeds; "
    "the two sides are then compared seed by seed on the score of the claim. A claim is called reproduced "
    "(contradicted) if the difference has the claimed (the other) sign and its two-sided t-test over seeds, corrected "
    f"by Holm for the study's number of claims, has p < {LEVEL}; otherwise the effect was not seen. ± is one standard "
    "error over seeds."
)
_HEAD = (
    "claim",
    "source",
    "number in the source",
    "n",
    "difference ± s.e.",
    "p (Holm)",
    "verdict",
    "settings compared",
)

_CSS = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5c5c5c; --back: #fff; --line: #d5d8dd; --box: #f3f4f6;
        --good: #00664b; --bad: #b03a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --soft: #a8adb5; --back: #17191c; --line: #3b4048;
        --box: #23262b; --good: #4fd0a5; --bad: #ff9d66; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 76rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); } .soft { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
.scroll td:first-child, .scroll td:last-child { min-width: 15rem; } .scroll td:nth-child(5) { min-width: 9rem; }
.reproduced { color: var(--good); font-weight: 600; } .contradicted { color: var(--bad); font-weight: 600; }
img { width: 100%; max-width: 56rem; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
figure { margin: 1.5rem 0; } pre { background: var(--box); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
"""


def write_reports(studies: Sequence[Study], folder: str | PathLike[str]) -> Path:
    """Write ``report.html`` with all studies, and ``NAME.md`` for each, into ``folder``; the page's path."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    found = [compare(study) for study in studies]
    for study, findings in zip(studies, found, strict=True):
        write_text(folder / f"{study.name}.md", _markdown(study, findings))
    body = "\n".join(_section(study, findings) for study, findings in zip(studies, found, strict=True))
    page = folder / "report.html"
    write_text(
        page,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>lagless: studies</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>Studies</h1>\n"
        f"<p class='soft'>{escape(RULE)}</p>\n{_overview(studies, found)}\n{body}\n</body>\n</html>\n",
    )
    return page


def _overview(studies: Sequence[Study], found: Sequence[Sequence[Finding]]) -> str:
    rows = "".join(
        f"<tr><td><a href='#{study.name}'>{escape(study.title)}</a></td>"
        + "".join(f"<td>{sum(f.verdict is v for f in findings)}</td>" for v in Verdict)
        + "</tr>"
        for study, findings in zip(studies, found, strict=True)
    )
    head = "".join(f"<th>{name}</th>" for name in ("study", *(v.value for v in Verdict)))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _section(study: Study, findings: Sequence[Finding]) -> str:
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td class='{finding.verdict.value.replace(' ', '-')}'>{escape(cell)}</td>"
            if name == "verdict"
            else f"<td>{escape(cell)}</td>"
            for name, cell in zip(_HEAD, _cells(finding), strict=True)
        )
        + "</tr>"
        for finding in findings
    )
    head = "".join(f"<th>{name}</th>" for name in _HEAD)
    figures = "".join(
        f"<figure><img alt='{escape(figure.caption)}' src='data:image/png;base64,"
        f"{base64.b64encode(draw(study, figure)).decode()}'><figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in study.figures
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in study.notes)
    return (
        f"<h2 id='{study.name}'>{escape(study.title)}</h2>\n<p>{escape(study.question)}</p>\n"
        f"<p class='soft'>{escape(study.scale)}</p>\n<div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>\n{figures}\n{f'<ul>{notes}</ul>' if notes else ''}\n"
        f"<p class='soft'>{escape(_making(study))}</p><pre>{escape(chr(10).join(study.commands))}</pre>"
    )


def _markdown(study: Study, findings: Sequence[Finding]) -> str:
    rows = [_HEAD, ("---",) * len(_HEAD), *(_cells(finding) for finding in findings)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    notes = "".join(f"- {note}\n" for note in study.notes)
    commands = "\n".join(study.commands)
    return (
        f"# {study.title}\n\n{study.question}\n\n{study.scale}\n\n{RULE}\n\n{table}\n\n{notes}\n{_making(study)}\n\n"
        f"```\n{commands}\n```\n"
    )


def _cells(finding: Finding) -> tuple[str, ...]:
    claim, difference = finding.claim, finding.difference
    return (
        claim.text,
        claim.source,
        claim.number or "none given",
        str(difference.n),
        f"{with_error(difference.value, difference.standard_error)} ({claim.score})",
        f"{finding.p_value:.2g}",
        finding.verdict.value,
        f"{_side(claim.method, finding.method)}; {_side(claim.baseline, finding.baseline)}"
        + ("" if finding.equal_budgets else "; budgets differ"),
    )


def _side(method: str, side: Side) -> str:
    chosen = f"{method}{_words(side.setting)}"
    among = f", best of {side.budget}" if side.budget > 1 else ""
    edge = f", at the edge in {' and '.join(side.at_edge)}" if side.at_edge else ""
    return chosen + among + edge + (f" ({side.diverged} diverged)" if side.diverged else "")


def _words(setting: Setting) -> str:
    return " (" + ", ".join(f"{key} {_number(value)}" for key, value in setting.items()) + ")" if setting else ""


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _making(study: Study) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in study.machine.items() if value is not None)
    return (
        f"{len(study.runs)} runs and averages, {study.seconds / 60:.0f} minutes by the clock; {machine}; "
        f"commit {study.commit or 'unknown'}."
    )


def with_error(value: float, error: float) -> str:
    """A number with its standard error, both to the error's second digit.

    >>> with_error(-0.000352, 0.0000123), with_error(0.37, 0.052)
    ('-0.000352 ± 0.000012', '+0.370 ± 0.052')
    """
    if not 0.0 < error < math.inf:
        return f"{value:+.4g} ± {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:+.{decimals}f} ± {error:.{decimals}f}"
