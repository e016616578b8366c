"""Averaging rules: frozen hyperparameters that know the coefficients of a linear filter and nothing else."""

from lagless._deprecated import former_names as _former_names
from lagless.rules._bias_corrected import BEMA as BEMA, OUEMA as OUEMA
from lagless.rules._calls import CheckedCall as CheckedCall, checked as checked, rule_line as rule_line
from lagless.rules._clock import (
    Event as Event,
    Tick as Tick,
    UpdateSchedule as UpdateSchedule,
    read_after as read_after,
    read_between_updates as read_between_updates,
    ticks as ticks,
)
from lagless.rules._decay import DecayAverage as DecayAverage
from lagless.rules._exponential import DEMA as DEMA, EMA as EMA
from lagless.rules._filter import (
    Anchor as Anchor,
    FloatArray as FloatArray,
    anchor as anchor,
    check_steps as check_steps,
    common_update_freq as common_update_freq,
    count_updates as count_updates,
    effective_iterates as effective_iterates,
    equivalent_schedule as equivalent_schedule,
    mean_age as mean_age,
    require_updates as require_updates,
    run_anchor as run_anchor,
    schedule_of as schedule_of,
    trajectory_weights as trajectory_weights,
    weight_on_start as weight_on_start,
    weights_of as weights_of,
)
from lagless.rules._gains import (
    ConstantGain as ConstantGain,
    Gain as Gain,
    HalfLifeGain as HalfLifeGain,
    PowerGain as PowerGain,
    PowerSchedule as PowerSchedule,
    ProfileGain as ProfileGain,
    UniformGain as UniformGain,
)
from lagless.rules._json import (
    hyperparameters as hyperparameters,
    rule_from_dict as rule_from_dict,
    rule_to_dict as rule_to_dict,
    same_rule as same_rule,
)
from lagless.rules._named import default_rule as default_rule, named_rules as named_rules
from lagless.rules._notes import (
    AverageWarning as AverageWarning,
    rate_note as rate_note,
    run_note as run_note,
    run_notes as run_notes,
    spread_note as spread_note,
    start_note as start_note,
)
from lagless.rules._reconstruction import Reconstruction as Reconstruction, reconstruct as reconstruct
from lagless.rules._registry import (
    built_in_rules as _built_in_rules,
    find_rule as find_rule,
    kind_of as kind_of,
    known_rules as known_rules,
)
from lagless.rules._rule import (
    EmaBuffer as EmaBuffer,
    InitialWeights as InitialWeights,
    ReadCoefficients as ReadCoefficients,
    Rule as Rule,
    SnapshotBuffer as SnapshotBuffer,
    UpdateCoefficients as UpdateCoefficients,
)
from lagless.rules._settings import (
    RuleArgument as RuleArgument,
    rule_arguments as rule_arguments,
    rule_names as rule_names,
    rules_from_settings as rules_from_settings,
)
from lagless.rules._warmup import WarmupAverage as WarmupAverage
from lagless.rules._warmup_ema import WarmupEMA as WarmupEMA
from lagless.rules._width import profile_exponent as profile_exponent, rescaled as rescaled
from lagless.rules._windows import (
    PowerEMA as PowerEMA,
    UniformAverage as UniformAverage,
    WindowAverage as WindowAverage,
)

RULES = _built_in_rules()
"""The rules of lagless itself, by name: whatever the modules imported above define."""

__getattr__ = _former_names(
    __name__,
    {
        "Average": "lagless.rules:EmaBuffer",
        "PowerClock": "lagless.rules:PowerSchedule",
        "Read": "lagless.rules:ReadCoefficients",
        "Snapshot": "lagless.rules:SnapshotBuffer",
        "Start": "lagless.rules:InitialWeights",
        "Timing": "lagless.rules:UpdateSchedule",
        "Update": "lagless.rules:UpdateCoefficients",
        "tail": "lagless.rules:read_between_updates",
    },
)
