"""Averaging rules: frozen hyperparameters that know the coefficients of a linear filter and nothing else."""

from lagless.rules._bias_corrected import BEMA as BEMA
from lagless.rules._bias_corrected import OUEMA as OUEMA
from lagless.rules._exponential import DEMA as DEMA
from lagless.rules._exponential import EMA as EMA
from lagless.rules._json import RULES as RULES
from lagless.rules._json import rule_from_dict as rule_from_dict
from lagless.rules._json import rule_to_dict as rule_to_dict
from lagless.rules._named import named_rules as named_rules
from lagless.rules._rule import Average as Average
from lagless.rules._rule import Read as Read
from lagless.rules._rule import Rule as Rule
from lagless.rules._rule import Snapshot as Snapshot
from lagless.rules._rule import Start as Start
from lagless.rules._rule import Update as Update
from lagless.rules._settings import rules_from_settings as rules_from_settings
from lagless.rules._windows import PowerEMA as PowerEMA
from lagless.rules._windows import UniformAverage as UniformAverage
from lagless.rules._windows import WindowAverage as WindowAverage
