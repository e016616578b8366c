"""Evaluation: cross-entropy on fixed held-out sequences, closed-loop accuracy, and how much it oscillates."""

from lagless.lab.evaluation._answers import (
    extract_choice as extract_choice,
    extract_number as extract_number,
    extract_yes_no as extract_yes_no,
)
from lagless.lab.evaluation._arithmetic import Problem as Problem, problems as problems
from lagless.lab.evaluation._closed_loop import (
    TASKS as TASKS,
    ClosedLoop as ClosedLoop,
    Score as Score,
    hf_model as hf_model,
)
from lagless.lab.evaluation._held_out import (
    Window as Window,
    held_out_documents as held_out_documents,
    held_out_sequences as held_out_sequences,
    pad as pad,
)
from lagless.lab.evaluation._loss import Losses as Losses, Sequences as Sequences, sequence_losses as sequence_losses
from lagless.lab.evaluation._oscillation import Oscillation as Oscillation, oscillation as oscillation
from lagless.lab.evaluation._vllm import served as served, vllm_model as vllm_model
