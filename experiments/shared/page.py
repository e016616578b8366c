"""The page of a study of cells: figures first, then tables, made of its summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared.cells import store
from experiments.shared.comparisons import Cell, by_condition
from experiments.shared.figures import draw_shown, draw_widths
from experiments.shared.summary import PARTS, Plan, summarise

from lagless.checkpoints import atomic_file

TEXTS = {"reporting": "books", "plays": "plays", "stories": "stories"}
BEGIN, END = "<!-- paper-clock: made by the study's command report -->", "<!-- paper-clock: end -->"


def write_report(plan: Plan, cells: Sequence[Cell], results: Path, page: Path) -> dict[str, Any]:
    """Write ``summary.json`` into ``results``, the page, and its figures beside it; return what is in the summary."""
    summary = summarise(plan, cells)
    store(results / "summary.json", summary, indent=1)
    figures = page.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    if cells:
        draw_shown(summary["shown"], plan.floor, figures / f"{page.stem}-rules.png")
        draw_widths(by_condition(cells), figures / f"{page.stem}-widths.png")
    write_text(page, _page(plan, summary, page.stem))
    return summary


def write_block(document: Path, summary: Mapping[str, Any]) -> None:
    """Put the study's table into a document, between the lines ``BEGIN`` and ``END``."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise ValueError(f"{document} has no lines {BEGIN!r} and {END!r}.")
    write_text(document, f"{before}{BEGIN}\n\n{block(summary)}\n\n{END}{after}")


def block(summary: Mapping[str, Any]) -> str:
    """Return the table of rules against live weights, and how many claims were judged, for the documentation."""
    done, planned = summary["cells"]["done"], summary["cells"]["planned"]
    verdicts = [c["verdict"] for c in summary["claims"]]
    judged = [v for v in verdicts if v is not None]
    said = f"{len(judged)} of {len(verdicts)} comparisons have the three seeds that a verdict needs"
    counts = ", ".join(f"{judged.count(v)} {v}" for v in dict.fromkeys(judged))
    return "\n\n".join([
        f"{done} of {planned} runs are in; {said}{f': {counts}' if counts else ', so that no claim is judged yet'}. "
        "Difference to the live weights of the same run, nats per token on held-out books, ± one standard error over "
        "seeds and books (over books alone where there is one seed); n is the number of seeds.",
        shown_table(summary["shown"]),
    ])  # fmt: skip


def shown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of rules by condition."""
    conditions = list(dict.fromkeys(_condition(row) for row in rows))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(row["label"], {})[_condition(row)] = f"{row['difference']:+.4f} ± {row['standard_error']:.4f}"
    return table(["rule", *conditions], [[label, *(by[c] for c in conditions)] for label, by in found.items()])


def _condition(row: Mapping[str, Any]) -> str:
    at = row["condition"]
    return f"{at['optimizer']} {at['rate']:g}, {at['schedule']}, batch {at['batch']}, n = {row['seeds']}"


def write_text(path: Path, text: str) -> None:
    """Write a text at once or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _page(plan: Plan, summary: Mapping[str, Any], stem: str) -> str:
    done, planned = summary["cells"]["done"], summary["cells"]["planned"]
    parts = [
        f"# {plan.title}: results",
        f"{done} of {planned} runs are in. Design, claims and rules of decision were written before them: "
        f"`{plan.page}`. "
        "This page, its figures and `summary.json` are made of the cells by the study's command `report`. "
        "Differences are nats per token; negative is better.",
        *(_figures(summary, stem) if summary["shown"] else []),
        "## Runs",
        table(
            ["optimizer", "rate", "schedule", "batch", "seeds", *(f"live, {TEXTS[p]}" for p in PARTS), "θ_0, books"],
            [
                [c["optimizer"], f"{c['rate']:g}", c["schedule"], c["batch"], len(c["seeds"]),
                 *(f"{c['live'][p]:.3f}" for p in PARTS), f"{c['start']['reporting']:.3f}"]
                for c in summary["conditions"]
            ],
        ),
        "## The default rule",
        f"Difference to the live weights of the same run. Rules whose worst case, over all AdamW runs and the three "
        f"texts, is within {plan.floor} of the smallest are equal (marked *); the best mean on books wins among them. "
        f"Chosen by these runs: **{summary['decision'][0] if summary['decision'] else 'none yet'}**.",
        *(_against_present(summary["against_present"]) if summary["decision"] else []),
        *_by_width(summary["standings"]),
        "### All candidates",
        _standings(summary["standings"], summary["decision"]),
        "Beside them, over the same runs:",
        _standings(summary["beside"], []),
    ]  # fmt: skip
    if summary["others"]:
        parts += ["With SGD and momentum:", _standings(summary["others"], [])]
    parts += [
        "## Claims",
        f"Reporting books. Standard errors cover seeds and documents; those of documents alone are in brackets where "
        f"one seed is in. Verdicts need {plan.least_seeds} seeds, use p-values corrected by Holm over all comparisons, "
        f"and name no difference below {plan.floor}.",
        table(
            ["", "claim", "source", "condition", "n", "difference", "method", "θ_0", "age/T", "iterates", "verdict"],
            [_claim_row(c) for c in summary["claims"]],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _figures(summary: Mapping[str, Any], stem: str) -> list[str]:
    return [
        "## Rules against live weights",
        f"![Difference to the live weights by rule and run](figures/{stem}-rules.png)",
        "Held-out books, ± one standard error over seeds and books (over books alone where there is one seed). "
        '"Best" is chosen on the tuning books. The grey band is the smallest difference worth naming.',
        shown_table(summary["shown"]),
        "## Widths",
        f"![Difference to the live weights by width](figures/{stem}-widths.png)",
        "Above, the paper's clock, φ = 400: EMA and BEMA by κ. Below, scale-free rules by f, the half-life as a share "
        "of the run. The numbers are in the tables below and in the cells.",
    ]


def _claim_row(c: Mapping[str, Any]) -> list[Any]:
    at = c["condition"]
    method = c["method"]
    edge = f" (edge: {', '.join(c['at_edge'])})" if c["at_edge"] else ""
    return [
        c["key"], c["text"], c["source"], f"{at['optimizer']} {at['rate']:g}, {at['schedule']}, batch {at['batch']}",
        c["seeds"], f"{c['difference']:+.4f} {_error(c)}", f"`{method['name']}`{edge}", f"{method['theta_0']:.3f}",
        f"{method['age']:.3f}", f"{method['iterates']:.1f}", c["verdict"] or "too few seeds",
    ]  # fmt: skip


def _error(row: Mapping[str, Any]) -> str:
    if row["standard_error"] is None:
        return f"(± {row['standard_error_of_documents_alone']:.4f})"
    return f"± {row['standard_error']:.4f}"


def _against_present(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    present = rows[0]["present"]
    return [
        f"Against the present default, `{present}`, on books, mean over the conditions:",
        table(
            ["rule", f"minus `{present}`", "seeds in all conditions"],
            [[f"`{row['name']}`", f"{row['difference']:+.4f} {_error(row)}", row["seeds"]] for row in rows],
        ),
    ]


COLUMNS = {
    "EMA": "ema-f f={f}",
    **{f"θ_0, c = {c}": f"bema-f f={{f}} c={c}" for c in ("0.25", "0.5", "1")},
    **{f"slow, c = {c}": f"slow-bema-f f={{f}} c={c}" for c in ("0.25", "0.5", "1")},
    "DEMA": "dema-f f={f}",
}


def _by_width(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of width by anchor and share of the lag removed."""
    named = {row["name"]: row for row in rows}
    shown: list[tuple[str, Callable[[Mapping[str, Any]], float | None]]] = [
        ("Books, mean over the runs at a constant rate", lambda row: row["mean_constant"]),
        ("Books, mean over the runs whose rate decays", lambda row: row["mean_decayed"]),
        ("Worst of all runs and texts", lambda row: max(row["worst"].values())),
    ]
    widths = [row["name"].removeprefix("ema-f f=") for row in rows if row["name"].startswith("ema-f ")]
    found = []
    for title, value in shown:
        values = [[f, *(value(named[name.format(f=f)]) for name in COLUMNS.values())] for f in widths]
        if not any(None in line for line in values):
            numbers = [[line[0], *(f"{number:+.4f}" for number in line[1:])] for line in values]
            found += [f"### {title}", table(["f", *COLUMNS], numbers)]
    return found


def _standings(rows: Sequence[Mapping[str, Any]], chosen: Sequence[str]) -> str:
    ordered = sorted(rows, key=lambda r: max(r["worst"].values()))
    return table(
        ["rule", "age/T", "iterates", "worst of all", "in", *(f"worst, {TEXTS[p]}" for p in PARTS),
         *(f"mean, {TEXTS[p]}" for p in PARTS), "books, constant", "books, decayed"],
        [
            [f"`{r['name']}`{' *' if r['name'] in chosen else ''}", f"{r['age']:.3f}", f"{r['iterates']:.1f}",
             f"{max(r['worst'].values()):+.4f}", r["worst_run"], *(f"{r['worst'][p]:+.4f}" for p in PARTS),
             *(f"{r['mean'][p]:+.4f}" for p in PARTS),
             *("" if r[key] is None else f"{r[key]:+.4f}" for key in ("mean_constant", "mean_decayed"))]
            for r in ordered
        ],
    )  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [list(map(str, head)), ["---"] * len(head), *(list(map(str, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
