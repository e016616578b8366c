"""Studies: results of many runs, what they say of a claim, and the report."""

from lagless.experiments.report._compare import Finding as Finding
from lagless.experiments.report._compare import chosen_runs as chosen_runs
from lagless.experiments.report._compare import compare as compare
from lagless.experiments.report._report import write_reports as write_reports
from lagless.experiments.report._study import Claim as Claim
from lagless.experiments.report._study import Figure as Figure
from lagless.experiments.report._study import Run as Run
from lagless.experiments.report._study import Study as Study
from lagless.experiments.report._study import load_study as load_study
from lagless.experiments.report._study import save_study as save_study
