"""``lagless tune``: find the best averaging rule and setting for a run in few evaluations."""

from lagless.lab.tune._loss import AverageLoss as AverageLoss
from lagless.lab.tune._quadratic_model import QuadraticModel as QuadraticModel
from lagless.lab.tune._ranges import (
    SEARCH_RANGES as SEARCH_RANGES,
    SearchRange as SearchRange,
    at_edge as at_edge,
    rules_searched as rules_searched,
)
from lagless.lab.tune._search import (
    Candidate as Candidate,
    Trial as Trial,
    Tuned as Tuned,
    tune as tune,
    write_tuned as write_tuned,
)
from lagless.lab.tune._trust_region import TrustRegion as TrustRegion
