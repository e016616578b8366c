"""``lagless demo``: train a small language model on this machine, average it in many ways, and report what was seen."""

from lagless.lab.demo._demo import run_demo as run_demo
from lagless.lab.demo._plan import Plan as Plan, Shape as Shape
from lagless.lab.demo._results import DemoResult as DemoResult, Difference as Difference, Row as Row
