"""What a run of the demo found, as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lagless.lab.demo._plan import Plan
from lagless.rules import BEMA, EMA, OUEMA, Rule


@dataclass(frozen=True)
class Difference:
    """How much lower (negative) or higher one loss is than another on the same text.

    Attributes:
        mean: over sequences, in nats per token.
        standard_error: of that mean, over held-out files.
    """

    mean: float
    standard_error: float

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors from zero."""
        return abs(self.mean) > 2.0 * self.standard_error

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class Candidate:
    """A rule that was followed.

    Attributes:
        name: its name in ``metrics.jsonl``.
        rule: the rule.
        validation: its loss on the validation text at the end of the run, minus the live model's.
        mean_age: how many steps the average trails behind the live weights.
        effective_iterates: how many iterates it amounts to against independent noise.
        weight_on_start: the weight on the weights at which averaging began.
    """

    name: str
    rule: Rule
    validation: float
    mean_age: float
    effective_iterates: float
    weight_on_start: float


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: its name for people, "EMA" or "best EMA".
        folder: its model in ``averages/``.
        candidate: the rule.
        loss: on the test text, in nats per token.
        difference: that loss minus the live model's.
    """

    label: str
    folder: str
    candidate: Candidate
    loss: float
    difference: Difference


@dataclass(frozen=True)
class Sample:
    """The same beginning continued by two models."""

    source: str
    prompt: str
    live: str
    average: str


@dataclass(frozen=True)
class DemoResult:
    """What :func:`run_demo` found, and where it lies.

    Attributes:
        out: the output folder.
        plan: the settings of the run.
        corpus: what the text is, in words.
        parameters: of the model.
        seconds: the whole demo took.
        live_loss: of the live model on the test text, in nats per token.
        rows: EMA, BEMA, OUEMA and DEMA, first matched and then each at its best.
        matched: test loss of BEMA minus that of EMA at the same κ and φ.
        best: test loss of the best BEMA minus that of the best EMA.
        candidates: all rules that were followed.
        curves: by name, ``"live"`` among them: steps and held-out losses.
        sample: text from the live model and from the best average.
        files: held-out files behind the standard errors.
        tokens: held-out tokens behind the losses in the table.
    """

    out: Path
    plan: Plan
    corpus: str
    parameters: int
    seconds: float
    live_loss: float
    rows: tuple[Row, ...]
    matched: Difference
    best: Difference
    candidates: tuple[Candidate, ...]
    curves: dict[str, list[tuple[int, float]]]
    sample: Sample
    files: int
    tokens: int

    @property
    def report(self) -> Path:
        """The report."""
        return self.out / "report.html"

    @property
    def winner(self) -> Row:
        """The best average, chosen on the validation text."""
        return min(self.rows, key=lambda row: row.candidate.validation)

    @property
    def matched_rows(self) -> tuple[Row, ...]:
        """The rules at the same κ and φ."""
        return tuple(row for row in self.rows if not row.label.startswith("best "))

    @property
    def best_rows(self) -> tuple[Row, ...]:
        """The rules at their best."""
        return tuple(row for row in self.rows if row.label.startswith("best "))

    def row(self, label: str) -> Row:
        """The row with that label."""
        return next(row for row in self.rows if row.label == label)


def settings(rule: Rule) -> str:
    """The hyperparameters of a rule, short."""
    if isinstance(rule, EMA) and rule.half_life is not None:
        parts = [f"half-life {rule.half_life:g}"]
    else:
        parts = [f"κ={vars(rule)['ema_power']:g}"]
    if isinstance(rule, BEMA | OUEMA):
        parts.append(f"η={rule.bias_power:g}")
    return ", ".join([*parts, f"φ={rule.update_freq}"])
