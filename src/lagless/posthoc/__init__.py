"""Averages of stored checkpoints: find them, combine them in one pass, write models that load."""

from lagless.posthoc.average import AverageSummary as AverageSummary
from lagless.posthoc.average import RunSummary as RunSummary
from lagless.posthoc.average import average_checkpoints as average_checkpoints
from lagless.posthoc.average import inspect_run as inspect_run
from lagless.posthoc.checkpoint import Checkpoint as Checkpoint
from lagless.posthoc.checkpoint import open_checkpoint as open_checkpoint
from lagless.posthoc.combine import combine_checkpoints as combine_checkpoints
from lagless.posthoc.errors import CheckpointError as CheckpointError
from lagless.posthoc.fingerprint import fingerprint as fingerprint
from lagless.posthoc.product import Consumer as Consumer
from lagless.posthoc.product import stream_product as stream_product
from lagless.posthoc.trajectory import Trajectory as Trajectory
from lagless.posthoc.trajectory import find_checkpoints as find_checkpoints
