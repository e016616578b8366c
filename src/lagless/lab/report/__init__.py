"""Studies: results of many runs, what they say of a claim, and the report."""

from lagless.lab.report._compare import Finding as Finding, chosen_runs as chosen_runs, compare as compare
from lagless.lab.report._report import write_reports as write_reports
from lagless.lab.report._study import (
    Claim as Claim,
    Figure as Figure,
    Run as Run,
    Study as Study,
    load_study as load_study,
    save_study as save_study,
)
