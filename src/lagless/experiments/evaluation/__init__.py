"""Evaluation: cross-entropy on fixed held-out sequences, closed-loop accuracy, and how much it oscillates."""

from lagless.experiments.evaluation._answers import extract_choice as extract_choice
from lagless.experiments.evaluation._answers import extract_number as extract_number
from lagless.experiments.evaluation._answers import extract_yes_no as extract_yes_no
from lagless.experiments.evaluation._arithmetic import Problem as Problem
from lagless.experiments.evaluation._arithmetic import problems as problems
from lagless.experiments.evaluation._closed_loop import TASKS as TASKS
from lagless.experiments.evaluation._closed_loop import ClosedLoop as ClosedLoop
from lagless.experiments.evaluation._closed_loop import Score as Score
from lagless.experiments.evaluation._closed_loop import hf_model as hf_model
from lagless.experiments.evaluation._closed_loop import vllm_model as vllm_model
from lagless.experiments.evaluation._held_out import held_out_sequences as held_out_sequences
from lagless.experiments.evaluation._loss import Losses as Losses
from lagless.experiments.evaluation._loss import Sequences as Sequences
from lagless.experiments.evaluation._loss import sequence_losses as sequence_losses
from lagless.experiments.evaluation._oscillation import Oscillation as Oscillation
from lagless.experiments.evaluation._oscillation import oscillation as oscillation
