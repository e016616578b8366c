"""What the runs of a study say of its claims."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from lagless.lab.report._study import Claim, Run, Setting, Study, Value
from lagless.lab.statistics import Mean, Verdict, edges, holm, paired_difference, verdict


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        setting: the hyperparameters that were chosen.
        scores: seed → the compared score.
        budget: how many settings there were to choose from.
        diverged: how many of them diverged on a seed, and could not be chosen.
        at_edge: numeric hyperparameters that were chosen from three values or more and sit at an end, where a wider
            grid may have had a better one. 0 is no edge.
    """

    setting: Setting
    scores: dict[int, float]
    budget: int
    diverged: int
    at_edge: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What was found of a claim; ``p_value`` is Holm's over all claims of the study."""

    claim: Claim
    method: Side
    baseline: Side
    difference: Mean
    p_value: float
    verdict: Verdict

    @property
    def equal_budgets(self) -> bool:
        """Whether both sides had as many settings to choose from."""
        return self.method.budget == self.baseline.budget


def compare(study: Study) -> list[Finding]:
    """Test every claim of a study: settings are chosen by the score named beforehand, differences paired by seed.

    Raises:
        ValueError: if a claim names a method or a score that no run has, or seeds differ between its two sides.
    """
    pairs = [
        (_side(study, claim, claim.method, claim.at), _side(study, claim, claim.baseline, _baseline_at(claim)))
        for claim in study.claims
    ]
    differences = [paired_difference(method.scores, baseline.scores) for method, baseline in pairs]
    corrected = holm([difference.p_value for difference in differences])
    return [
        Finding(claim, *pair, difference, p, verdict(difference, claimed=claim.claimed, p_value=p, floor=claim.floor))
        for claim, pair, difference, p in zip(study.claims, pairs, differences, corrected, strict=True)
    ]


def chosen_runs(study: Study) -> list[Run]:
    """The runs that the claims compare, each once: whatever is not among them needs no test score.

    Raises:
        ValueError: if a claim names a method, setting or score to choose by that no run has.
    """
    chosen: dict[int, Run] = {}
    for claim in study.claims:
        for method, at in ((claim.method, claim.at), (claim.baseline, _baseline_at(claim))):
            chosen |= {id(run): run for run in _choice(study, claim, method, at)[0]}
    return list(chosen.values())


def settings_of(
    runs: Iterable[Run], method: str, at: Mapping[str, Value] = MappingProxyType({}), *, tuning: bool = False
) -> list[list[Run]]:
    """The runs of a method, one list per setting, in the order of their first appearance: reported ones or tuning.

    Args:
        runs: of any methods.
        method: whose runs are wanted.
        at: hyperparameters held fixed; those that the method does not have are no restriction.
        tuning: which runs are wanted.
    """
    own = [run for run in runs if run.method == method]
    fixed = at.keys() & {key for run in own for key in run.setting}
    groups: dict[str, list[Run]] = {}
    for run in own:
        if run.tuning == tuning and all(run.setting.get(key) == at[key] for key in fixed):
            groups.setdefault(json.dumps(run.setting, sort_keys=True), []).append(run)
    return list(groups.values())


def best_setting(groups: Sequence[list[Run]], score: str, maximize: bool = False) -> list[Run]:
    """The setting with the smallest (largest) mean score over its seeds, among those that did not diverge."""
    sign = -1 if maximize else 1
    whole = [group for group in groups if all(run.scores is not None for run in group)]
    if not whole:
        raise ValueError(f"every setting of {groups[0][0].method!r} diverged on some seed; none can be compared.")
    return min(whole, key=lambda group: sign * float(np.mean([score_of(run, score) for run in group])))


def score_of(run: Run, score: str) -> float:
    """A run's score.

    Raises:
        ValueError: if the run has no such score.
    """
    if run.scores is None or score not in run.scores:
        raise ValueError(
            f"the run of {run.method!r} with {run.setting}, seed {run.seed}, has no score {score!r}; it has "
            f"{', '.join(run.scores or {}) or 'none, since it diverged'}."
        )
    return run.scores[score]


def _baseline_at(claim: Claim) -> Setting:
    return claim.at if claim.baseline_at is None else claim.baseline_at


def _side(study: Study, claim: Claim, method: str, at: Setting) -> Side:
    chosen, candidates = _choice(study, claim, method, at)
    diverged = sum(any(run.scores is None for run in group) for group in candidates)
    scores = {r.seed: score_of(r, claim.score) for r in chosen}
    return Side(chosen[0].setting, scores, len(candidates), diverged, _edges(chosen[0].setting, candidates))


def _edges(setting: Setting, candidates: Sequence[list[Run]]) -> tuple[str, ...]:
    tried: dict[str, set[float]] = {}
    for group in candidates:
        for axis, value in group[0].setting.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                tried.setdefault(axis, set()).add(value)
    grid = {axis: sorted(values) for axis, values in tried.items() if len(values) > 2 and setting.get(axis) in values}
    chosen = {axis: value for axis, value in setting.items() if isinstance(value, int | float)}
    return tuple(edges(chosen, grid, dict.fromkeys(grid, (0.0,))))


def _choice(study: Study, claim: Claim, method: str, at: Setting) -> tuple[list[Run], list[list[Run]]]:
    """The runs of the setting that stands for a method in a claim, and those of all settings it was chosen from."""
    reported, tuning = (settings_of(study.runs, method, at, tuning=stage) for stage in (False, True))
    if not reported:
        raise ValueError(f"{study.name}: no run of {method!r} at {at}, but the claim {claim.text!r} needs one.")
    candidates = reported
    if claim.selected_by is not None:
        candidates = tuning or reported
        chosen = _reported(study, best_setting(finalists(candidates), claim.selected_by, claim.maximize), reported)
    elif len(reported) == 1:
        chosen = reported[0]
    else:
        raise ValueError(
            f"{study.name}: {len(reported)} settings of {method!r} fit the claim {claim.text!r}; give selected_by, or "
            "fix them by at."
        )
    seeds = [run.seed for run in chosen]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"{study.name}: two runs of {method!r} with {chosen[0].setting} have the same seed.")
    return chosen, candidates


def finalists(groups: Sequence[list[Run]]) -> list[list[Run]]:
    """Of tuning runs, the settings that were not dropped before the last tuning seed."""
    if not groups[0][0].tuning:
        return list(groups)
    rounds = max(len(group) for group in groups)
    return [group for group in groups if len(group) == rounds]


def _reported(study: Study, best: list[Run], reported: Sequence[list[Run]]) -> list[Run]:
    """The reported runs of the setting that was found best."""
    for group in reported:
        if group[0].setting == best[0].setting:
            return group
    raise ValueError(
        f"{study.name}: the tuning of {best[0].method!r} chooses {best[0].setting}, and no reported run has it."
    )
