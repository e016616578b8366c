"""Averages of stored checkpoints over κ × η × φ: every setting on validation sequences, the compared ones on test too.

No setting is retrained: a run's checkpoints are read once and every average is formed from them in memory. Each rule
has the same number of settings to choose from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.shared.bench import once, store

from lagless.checkpoints import find_checkpoints
from lagless.lab.averages import LIVE, evaluate_averages
from lagless.lab.evaluate import load_tokenizer
from lagless.lab.evaluation import Sequences, held_out_sequences, sequence_losses
from lagless.lab.report import Claim, Figure, Run, Study, chosen_runs
from lagless.lab.sweep import Cell
from lagless.rules import BEMA, DEMA, EMA, OUEMA, Rule

VALID, TEST = "valid/loss", "test/loss"
PAPER = "Block and Zhang, arXiv 2508.00180"
FIGURE_ONLY = "in figures only"

LAG = 10
ETAS = (0.1, 0.2, 0.4, 0.8)
KAPPAS = (0.2, 0.4, 0.6, 0.8)  # BEMA and OUEMA, with each η
FINE_KAPPAS = tuple(round(0.05 * i, 2) for i in range(1, 17))  # EMA and DEMA: as many settings

Setting = dict[str, Any]


def settings(frequencies: Sequence[int], methods: Sequence[str]) -> dict[str, tuple[str, Setting, Rule]]:
    """By name, the method, its setting and its rule."""
    found: dict[str, tuple[str, Setting, Rule]] = {}
    for method in methods:
        corrected = method in ("bema", "ouema")
        for kappa in KAPPAS if corrected else FINE_KAPPAS:
            for eta in ETAS if corrected else (None,):
                for phi in frequencies:
                    setting = {"kappa": kappa, **({"eta": eta} if corrected else {}), "phi": phi}
                    rule = _rule(method, kappa, eta, phi)
                    found[f"{method} {setting}"] = (method, setting, rule)
    return found


def _rule(method: str, kappa: float, eta: float | None, phi: int) -> Rule:
    if method == "ema":
        return EMA(ema_power=kappa, lag=LAG, update_freq=phi)
    if method == "dema":
        return DEMA.paper(ema_power=kappa, lag=LAG, update_freq=phi)
    return {"bema": BEMA, "ouema": OUEMA}[method](ema_power=kappa, bias_power=eta, lag=LAG, update_freq=phi)


def losses(
    cell: Cell, part: str, sequences: Sequences, rules: Mapping[str, Rule], at: Sequence[int] | None = None
) -> dict[str, dict[int, float]]:
    """Nats per token of a run's live weights and averages: name → step → loss; kept beside the run.

    Args:
        cell: a finished run.
        part: what the sequences are, for the name of the file.
        sequences: what the loss is measured on.
        rules: by name.
        at: steps; by default the last.
    """
    record = cell.folder / f"losses-{part}.json"
    known: dict[str, dict[str, float]] = once(record, dict)  # steps are text in JSON
    last = find_checkpoints(cell.folder).steps[-1]
    steps = [str(step) for step in at or [last]]
    missing = {name: rule for name, rule in rules.items() if not known.get(name, {}).keys() >= set(steps)}
    if missing or not known.get(LIVE, {}).keys() >= set(steps):
        found = evaluate_averages(
            cell.folder, missing, lambda model: sequence_losses(model, sequences).mean.value, at=at
        )
        for one in found:
            known.setdefault(one.name, {})[str(one.step)] = round(one.result, 6)
        store(record, known)
    return {name: {int(step): value for step, value in by_step.items()} for name, by_step in known.items()}


@dataclass(frozen=True)
class Entry:
    """A run of the study: the average of a training run by one rule, or its live weights."""

    run: Run
    name: str
    rule: Rule | None
    cell: Cell


def validated(
    cells: Sequence[tuple[str, Cell]],
    methods: Mapping[str, Sequence[str]],
    frequencies: Sequence[int],
    sequences: Sequences,
) -> list[Entry]:
    """Every setting of every training run, with its validation loss.

    Args:
        cells: learning-rate schedule and finished training run.
        methods: schedule → rules to average by.
        frequencies: φ.
        sequences: for validation.
    """
    found: list[Entry] = []
    for schedule, cell in cells:
        grid = settings(frequencies, methods[schedule])
        valid = losses(cell, "valid", sequences, {name: rule for name, (_, _, rule) in grid.items()})
        for name, (method, setting, rule) in {LIVE: (LIVE, {}, None), **grid}.items():
            run = Run(
                method=method,
                setting={**setting, "schedule": schedule},
                seed=cell.seed,
                scores={VALID: max(valid[name].items())[1]},
            )
            found.append(Entry(run, name, rule, cell))
        print(f"{cell.folder.name}: {len(grid) + 1} settings on validation", flush=True)
    return found


def compared(entries: Sequence[Entry], claims: Sequence[Claim]) -> list[tuple[Cell, list[Entry]]]:
    """By training run, the entries that claims compare."""
    plan = Study(
        name="plan", title="", question="", scale="", claims=list(claims), runs=[entry.run for entry in entries],
        commands=[], commit=None, machine={}, seconds=0.0,
    )  # fmt: skip
    chosen = {id(run) for run in chosen_runs(plan)}
    found: dict[str, tuple[Cell, list[Entry]]] = {}
    for entry in entries:
        if id(entry.run) in chosen:
            found.setdefault(str(entry.cell.folder), (entry.cell, []))[1].append(entry)
    return list(found.values())


def averages_study(
    cells: Sequence[tuple[str, Cell]],
    methods: Mapping[str, Sequence[str]],
    frequencies: Sequence[int],
    claims: Sequence[Claim],
    valid: tuple[str, int],
    test: tuple[str, int],
    length: int,
    curves: int,
) -> list[Run]:
    """The runs of a study, with validation losses of all settings and test losses of those that claims compare.

    Args:
        cells: learning-rate schedule and finished training run.
        methods: schedule → rules to average by.
        frequencies: φ.
        claims: of the study; they decide which settings are tested.
        valid: file of held-out data, and how many sequences of it.
        test: likewise.
        length: tokens of a sequence.
        curves: steps between the points of the curves, which are drawn at a constant rate.
    """
    tokenizer = load_tokenizer(find_checkpoints(cells[0][1].folder).checkpoints[-1].folder)
    on_valid, on_test = (
        held_out_sequences(file, tokenizer, length=length, count=count) for file, count in (valid, test)
    )
    entries = validated(cells, methods, frequencies, on_valid)
    for cell, chosen in compared(entries, claims):
        rules = {entry.name: entry.rule for entry in chosen if entry.rule is not None}
        tested, drawn = losses(cell, "test", on_test, rules), {}
        if chosen[0].run.setting["schedule"] == "constant":
            steps = [step for step in find_checkpoints(cell.folder).steps if step and step % curves == 0]
            drawn = losses(cell, "curves", on_valid, rules, steps)
        for entry in chosen:
            entry.run.scores = {**(entry.run.scores or {}), TEST: max(tested[entry.name].items())[1]}
            entry.run.curves = {VALID: sorted(drawn[entry.name].items())} if drawn else {}
    return [entry.run for entry in entries]


def claim(
    text: str,
    method: str,
    baseline: str,
    *,
    source: str = PAPER,
    where: str = "",
    at: Setting,
    baseline_at: Setting | None = None,
    claimed: int = -1,
    number: str | None = FIGURE_ONLY,
) -> Claim:
    """A comparison of test losses at settings chosen on validation, unless ``at`` leaves one only."""
    return Claim(
        text=text,
        source=f"{source}, {where}" if where else source,
        number=number,
        method=method,
        baseline=baseline,
        score=TEST,
        claimed=claimed,  # type: ignore[arg-type]
        selected_by=VALID,
        at=at,
        baseline_at=baseline_at,
    )


def paper_claims(phi: int, decayed: str, constant: str = "constant") -> list[Claim]:
    """What the paper says of losses, for one learning rate, a constant schedule and a decayed one.

    Args:
        phi: the update frequency of the claims at matched settings.
        decayed: name of the decaying schedule.
        constant: name of the one that does not.
    """
    here, there = {"schedule": constant}, {"schedule": decayed}
    matched = {"kappa": 0.2, "eta": 0.2, "phi": phi, **here}
    return [
        claim("BEMA beats EMA at the same setting, κ = η = 0.2", "bema", "ema", where="Fig. 1(b)", at=matched),
        claim("BEMA beats the live weights at κ = η = 0.2", "bema", LIVE, where="Fig. 1(b)", at=matched),
        claim("EMA beats the live weights at κ = 0.2", "ema", LIVE, where="Fig. 1(b)", at=matched),
        claim("BEMA beats EMA, each at its best setting", "bema", "ema", where="Fig. 7", at=here),
        claim("BEMA at its best setting beats the live weights", "bema", LIVE, where="Fig. 7", at=here),
        claim("BEMA beats OUEMA, each at its best setting", "bema", "ouema", where="Figs. 4, 15", at=here),
        claim("OUEMA beats EMA, each at its best setting", "ouema", "ema", where="Fig. 4", at=here),
        claim("BEMA beats DEMA, each at its best setting", "bema", "dema", where="Fig. 14", at=here),
        claim("DEMA beats EMA, each at its best setting", "dema", "ema", where="Fig. 14", at=here),
        claim(
            "EMA at κ = 0.5 has a higher loss than the live weights",
            "ema",
            LIVE,
            where="Section 5.2: a significant increase",
            at={"kappa": 0.5, "phi": phi, **here},
            claimed=1,
        ),
        claim(
            f"A constant rate and BEMA beat {decayed} decay without an average",
            "bema",
            LIVE,
            where="App. A: decay is not needed",
            at=here,
            baseline_at=there,
        ),
        claim(
            f"With {decayed} decay, too, BEMA beats the live weights", "bema", LIVE, where="App. A, Fig. 7", at=there
        ),
        claim(
            "BEMA with frequent updates beats BEMA with rare ones",
            "bema",
            "bema",
            where="App. A, Fig. 11: smaller φ, lower losses",
            at={"phi": phi, **here},
            baseline_at={"phi": 3 * phi, **here},
        ),
    ]


def paper_figures(constant: str = "constant") -> list[Figure]:
    """Curves of the compared averages, and maps of κ × η against EMA and against the live weights."""
    here = {"schedule": constant}
    return [
        Figure(
            kind="curves",
            caption="Validation loss along training at a constant rate, each rule at its best setting.",
            score=VALID,
            at=here,
            methods=[LIVE, "ema", "bema", "ouema", "dema"],
        ),
        Figure(
            kind="map",
            caption="Validation loss over κ and η minus that of the best EMA; the better one of the two φ.",
            score=VALID,
            at=here,
            methods=["bema", "ouema"],
            x="kappa",
            y="eta",
            minus="ema",
        ),
        Figure(
            kind="map",
            caption="Validation loss over κ and φ minus that of the live weights.",
            score=VALID,
            at=here,
            methods=["ema", "dema"],
            x="kappa",
            y="phi",
            minus=LIVE,
        ),
    ]


def split(rows: Sequence[str], out: Path) -> dict[str, Path]:
    """Rows into ``train``, ``valid`` and ``test`` files, one in ten each for the last two."""
    paths = {part: out / f"{part}.jsonl" for part in ("train", "valid", "test")}
    for part, path in paths.items():
        kept = [row for i, row in enumerate(rows) if {0: "valid", 1: "test"}.get(i % 10, "train") == part]
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return paths
