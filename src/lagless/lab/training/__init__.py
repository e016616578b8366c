"""Training by a recipe, through the trainers of TRL and transformers."""

from lagless.lab.training._check import check_run as check_run
from lagless.lab.training._counted import counted_sequences as counted_sequences
from lagless.lab.training._dry_run import dry_run as dry_run
from lagless.lab.training._folder import FolderInUse as FolderInUse, read_result as read_result
from lagless.lab.training._optimizer import schedule_factor as schedule_factor
from lagless.lab.training._run import train as train
