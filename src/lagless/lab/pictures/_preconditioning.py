"""Coupling and inversion bias of Adam-type updates: per estimator, and how the two of plain Adam cancel."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from lagless.lab.pictures._drawing import COLOURS, QUIET, Picture, new_figure
from lagless.theory import AdamEstimator, Estimate, GradientLaw, PreconditionerBias, one_step_bias, stationary_bias

MEAN, STD, MICROBATCHES = 0.5, 1.0, 8
BETAS = (0.9, 0.95)
ESTIMATORS: dict[str, AdamEstimator] = {
    "Adam": AdamEstimator(),
    "Adam, inverse corrected": AdamEstimator("none", "post_ema"),
    "symmetric": AdamEstimator("symmetric"),
    "leave one out": AdamEstimator("leave_one_out"),
    "leave one out, jackknife": AdamEstimator("leave_one_out", "jackknife"),
    "split": AdamEstimator("split"),
    "split, inverse corrected": AdamEstimator("split", "post_ema"),
}
_PARTS = {
    "coupling": (COLOURS["EMA"], "o"),
    "inversion": (COLOURS["PowerEMA"], "^"),
    "total": (COLOURS["bound"], "D"),
}


def biases(samples: int = 1_000_000, steps: int = 1000, chains: int = 1000, seed: int = 0) -> dict[str, dict]:
    """For every estimator the bias of one step and that in the long run with :data:`BETAS`."""
    found: dict[str, dict] = {}
    for name, estimator in ESTIMATORS.items():
        law = gradient_law(estimator)
        found[name] = {
            "one step": one_step_bias(estimator, law, BETAS[1], samples, seed),
            "long run": stationary_bias(estimator, law, BETAS, steps, chains, seed),
        }
    return found


def gradient_law(estimator: AdamEstimator) -> GradientLaw:
    """Split halves are as large as the full batch of the others: as many gradients go into each numerator."""
    return GradientLaw(MEAN, STD, MICROBATCHES * (2 if estimator.cross_fit == "split" else 1))


def cancellation(
    betas2: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98, 0.99, 0.999),
    steps: int = 2000,
    chains: int = 1000,
    seed: int = 0,
) -> dict[float, PreconditionerBias]:
    """The long-run bias of plain Adam for several β₂."""
    law = GradientLaw(MEAN, STD, MICROBATCHES)
    return {beta: stationary_bias(AdamEstimator(), law, (BETAS[0], beta), steps, chains, seed) for beta in betas2}


def draw_biases(found: Mapping[str, Mapping[str, PreconditionerBias]]) -> Picture:
    """Coupling, inversion and total bias of every estimator."""
    figure, panels = new_figure(11.5, 4.9, columns=2, sharey=True)
    for axes, when in zip(panels, ("one step", "long run"), strict=True):
        for row, result in enumerate(found.values()):
            for shift, (part, (colour, marker)) in zip((-0.22, 0.0, 0.22), _PARTS.items(), strict=True):
                value: Estimate = getattr(result[when], part)
                axes.errorbar(
                    100.0 * value.mean,
                    row + shift,
                    xerr=200.0 * value.standard_error,
                    fmt=marker,
                    color=colour,
                    markersize=6,
                    capsize=3,
                    label=part if row == 0 else None,
                )
        _frame(axes, len(found))
        axes.set_xlabel("bias, % of the population update (± 2 s.e.)")
    panels[0].set_yticks(range(len(found)), list(found))
    panels[0].invert_yaxis()
    panels[0].set_title(f"one step's own noise (β₁ = 0, β₂ = {BETAS[1]:g})")
    panels[1].set_title(f"in the long run (β₁ = {BETAS[0]:g}, β₂ = {BETAS[1]:g})")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    numbers = {name: {when: _record(bias) for when, bias in result.items()} for name, result in found.items()}
    return Picture("biases", "Preconditioners: two biases per estimator", _bias_words(numbers), figure, numbers)


def draw_cancellation(found: Mapping[float, PreconditionerBias]) -> Picture:
    """Coupling, inversion and their sum against β₂."""
    figure, (axes,) = new_figure(8.5, 4.3)
    for part, (colour, marker) in _PARTS.items():
        values: list[Estimate] = [getattr(bias, part) for bias in found.values()]
        axes.errorbar(
            range(len(found)),
            [100.0 * value.mean for value in values],
            yerr=[200.0 * value.standard_error for value in values],
            fmt=f"{marker}-",
            color=colour,
            capsize=3,
            linewidth=1.2,
            label=part,
        )
    axes.axhline(0.0, color=QUIET, linewidth=1)
    axes.set_xticks(range(len(found)), [f"{beta:g}" for beta in found])
    axes.set(xlabel="β₂", ylabel="bias, % of the population update (± 2 s.e.)")
    axes.legend(loc="upper right")
    numbers = {f"{beta:g}": _record(bias) for beta, bias in found.items()}
    return Picture("cancellation", "Plain Adam: two biases that nearly cancel", _cancel_words(numbers), figure, numbers)


def _frame(axes: Axes, rows: int) -> None:
    for row in range(0, rows, 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f3f4f6", zorder=0)
    axes.axvline(0.0, color=QUIET, linewidth=1)
    axes.set_ylim(-0.5, rows - 0.5)


def _record(bias: PreconditionerBias) -> dict[str, dict[str, float]]:
    return {part: getattr(bias, part)._asdict() for part in _PARTS}


def percent(value: Mapping[str, float]) -> str:
    """As in "−1.499 ± 0.005 %": two standard errors."""
    return f"{100.0 * value['mean']:+.3f} ± {200.0 * value['standard_error']:.3f} %".replace("-", "−")


def _bias_words(numbers: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    adam, left_out, split = (numbers[name] for name in ("Adam", "leave one out", "split"))
    one, run = adam["one step"], adam["long run"]
    kept = left_out["long run"]["coupling"]["mean"] / run["coupling"]["mean"]
    return (
        f"A gradient of mean {MEAN:g} from {MICROBATCHES} microbatches of standard deviation {STD:g} each. Coupling: "
        "numerator and preconditioner share their noise, which shrinks the update. Inversion: on average 1/x is more "
        "than one over the average, which inflates it; most error bars are smaller than the marks. Left, in one "
        f"step, Adam's bias is {percent(one['total'])}, nearly all of it coupling, and leaving one microbatch out "
        f"brings it to {percent(left_out['one step']['total'])}. Right, with running averages: Adam's coupling is "
        f"{percent(run['coupling'])} and its inversion {percent(run['inversion'])}, together {percent(run['total'])}; "
        f"leaving one out keeps {kept:.0%} of the coupling, because history stays shared; only disjoint batches "
        f"(split, twice the data) remove it ({percent(split['long run']['coupling'])}), and then the inversion shows: "
        f"{percent(split['long run']['total'])} in total."
    )


def _cancel_words(numbers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    opposite = all(found["coupling"]["mean"] < 0.0 < found["inversion"]["mean"] for found in numbers.values())
    left = {
        beta: abs(found["total"]["mean"]) / max(abs(found["coupling"]["mean"]), abs(found["inversion"]["mean"]))
        for beta, found in numbers.items()
    }
    closest = min(left, key=left.__getitem__)
    share = left[closest]
    widest = max(numbers, key=lambda beta: abs(numbers[beta]["total"]["mean"]))
    signs = "have opposite signs for every β₂" if opposite else "do not have opposite signs for every β₂"
    return (
        f"The same gradient, β₁ = {BETAS[0]:g}, updates in the long run; error bars are smaller than the marks. "
        f"Coupling and inversion {signs}. They cancel best near β₂ = {closest}, where {share:.0%} of the larger one "
        f"is left; at β₂ = {widest} the sum is {percent(numbers[widest]['total'])}. Where they cancel, a correction "
        "that removes only one of them makes the mean update worse."
    )
