"""Conformance suite: properties every averaging rule must have, to be run on a rule of your own.

>>> from lagless import BEMA
>>> from lagless.testing import check_rule
>>> check_rule(BEMA(update_freq=5))
"""

from lagless.testing._rules import RULE_CHECKS as RULE_CHECKS
from lagless.testing._rules import check_rule as check_rule
