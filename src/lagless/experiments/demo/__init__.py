"""``lagless demo``: train a small language model on this machine, average it in many ways, and report what was seen."""

from lagless.experiments.demo._demo import run_demo as run_demo
from lagless.experiments.demo._plan import Plan as Plan
from lagless.experiments.demo._plan import Shape as Shape
from lagless.experiments.demo._results import DemoResult as DemoResult
from lagless.experiments.demo._results import Difference as Difference
from lagless.experiments.demo._results import Row as Row
