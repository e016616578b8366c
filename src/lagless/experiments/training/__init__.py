"""Training by a recipe, through the trainers of TRL and transformers."""

from lagless.experiments.training._dry_run import dry_run as dry_run
from lagless.experiments.training._folder import FolderInUse as FolderInUse
from lagless.experiments.training._folder import read_result as read_result
from lagless.experiments.training._run import train as train
