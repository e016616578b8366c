"""What a run of the demo consists of: how long, which model, which rules, evaluated when."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from lagless.rules import BEMA, DEMA, EMA, OUEMA, Rule

_CHECKPOINTS = 80  # of 4 MB each: the shortest φ that a modest folder allows
_CURVE_POINTS = 12
_MIN_STEPS = 20  # fewer give no curve


@dataclass(frozen=True)
class Shape:
    """The size of the Llama that is trained, of its vocabulary and its batches; about 1 M parameters as it stands."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 4
    heads: int = 4
    batch_size: int = 4
    length: int = 128


@dataclass(frozen=True)
class Plan:
    """The settings of one run; what is not given follows from ``steps``.

    Attributes:
        steps: optimizer steps.
        seed: of the initial weights and of the order of the data.
        shape: the model and its batches.
        learning_rate: constant after warm-up. The live loss was lowest with this one among 1e-3, 2e-3, 4e-3.
        curve_sequences: held-out sequences for the curves, evaluated many times and so few.
        validation_sequences: held-out sequences for choosing the best settings.
        test_sequences: held-out sequences for what is reported, from other files.
    """

    steps: int = 2000
    seed: int = 0
    shape: Shape = field(default_factory=Shape)
    learning_rate: float = 2e-3
    curve_sequences: int = 20
    validation_sequences: int = 96
    test_sequences: int = 384

    def __post_init__(self) -> None:
        if self.steps < _MIN_STEPS:
            raise ValueError(
                f"steps={self.steps}: too few for every rule to update and for a curve. Choose at least {_MIN_STEPS}."
            )

    @property
    def interval(self) -> int:
        """Steps from one checkpoint to the next, and φ of the matched rules."""
        return math.ceil(self.steps / _CHECKPOINTS)

    @property
    def warmup(self) -> int:
        """The first tenth of the run, in whole intervals: the learning rate rises, and averaging has not begun."""
        return self.interval * max(1, round(self.steps / 10 / self.interval))

    @property
    def evaluate_every(self) -> int:
        """Steps from one point of the curves to the next, in whole intervals."""
        return self.interval * max(1, round(self.steps / _CURVE_POINTS / self.interval))

    def matched(self) -> dict[str, Rule]:
        """The rules compared at the same κ and φ: the defaults of the paper, except that φ fits the run."""
        every, after = self.interval, self.warmup
        return {
            "ema": EMA(update_freq=every, update_after=after),
            "bema": BEMA.paper(update_freq=every, update_after=after),
            "ouema": OUEMA.paper(update_freq=every, update_after=after),
            "dema": DEMA.paper(update_freq=every, update_after=after),
        }

    def grid(self) -> dict[str, Rule]:
        """The settings among which the best of each kind is chosen; the matched ones are among them.

        All have the same pairs (κ, φ), whose windows reach from a twentieth to half of the run. BEMA and OUEMA have η
        besides, EMA has half-lives besides.
        """
        after, often = self.warmup, max(1, self.interval // 4)
        rules: dict[str, Rule] = {}
        pairs = [(power, 1) for power in (0.65, 0.8)] + [(power, self.interval) for power in (0.2, 0.35, 0.5)]
        for power, freq in pairs:
            setting = f"k{power:g}-f{freq}"
            for plain in (EMA, DEMA):
                rules[f"{plain.__name__.lower()}-{setting}"] = plain(
                    ema_power=power, update_freq=freq, update_after=after
                )
            for corrected, bias in itertools.product((BEMA, OUEMA), (0.2, 0.4)):
                rules[f"{corrected.__name__.lower()}-{setting}-n{bias:g}"] = corrected(
                    ema_power=power, bias_power=bias, update_freq=freq, update_after=after
                )
        for fraction in (0.01, 0.025, 0.05, 0.1):
            half_life = float(max(1, round(fraction * self.steps)))
            rules[f"ema-h{half_life:g}"] = EMA(half_life=half_life, update_freq=often, update_after=after)
        return rules

    def rules(self) -> dict[str, Rule]:
        """All rules that are followed, each once."""
        matched = self.matched()
        return matched | {name: rule for name, rule in self.grid().items() if rule not in matched.values()}
