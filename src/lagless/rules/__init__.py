"""Averaging rules: frozen hyperparameters that know the coefficients of a linear filter and nothing else."""

from lagless.rules._bias_corrected import BEMA as BEMA, OUEMA as OUEMA
from lagless.rules._exponential import DEMA as DEMA, EMA as EMA
from lagless.rules._filter import (
    Anchor as Anchor,
    FloatArray as FloatArray,
    anchor as anchor,
    check_steps as check_steps,
    common_update_freq as common_update_freq,
    count_updates as count_updates,
    effective_iterates as effective_iterates,
    mean_age as mean_age,
    require_updates as require_updates,
    run_anchor as run_anchor,
    run_note as run_note,
    start_note as start_note,
    tail as tail,
    ticks as ticks,
    trajectory_weights as trajectory_weights,
    weight_on_start as weight_on_start,
)
from lagless.rules._gains import (
    ConstantGain as ConstantGain,
    Gain as Gain,
    HalfLifeGain as HalfLifeGain,
    Tick as Tick,
    Timing as Timing,
)
from lagless.rules._named import named_rules as named_rules
from lagless.rules._reconstruction import Reconstruction as Reconstruction, reconstruct as reconstruct
from lagless.rules._registry import RULES as RULES, rule_from_dict as rule_from_dict, rule_to_dict as rule_to_dict
from lagless.rules._rule import (
    Average as Average,
    Read as Read,
    Rule as Rule,
    Snapshot as Snapshot,
    Start as Start,
    Update as Update,
)
from lagless.rules._settings import rules_from_settings as rules_from_settings
from lagless.rules._windows import (
    PowerEMA as PowerEMA,
    UniformAverage as UniformAverage,
    WindowAverage as WindowAverage,
)
