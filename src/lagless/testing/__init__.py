"""Conformance suites: properties every averaging rule and every optimizer must have, to be run on your own.

>>> import torch
>>> from lagless import BEMA
>>> from lagless.testing import check_optimizer, check_rule
>>> check_rule(BEMA.paper(update_freq=5))
>>> check_optimizer(torch.optim.AdamW)
"""

from lagless.testing._optimizers import OPTIMIZER_CHECKS as OPTIMIZER_CHECKS, check_optimizer as check_optimizer
from lagless.testing._rules import RULE_CHECKS as RULE_CHECKS, check_rule as check_rule
