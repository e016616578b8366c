"""Sweeps: one training run per combination of values and seed, handed out by Optuna."""

from lagless.lab.sweep._cells import (
    Cell as Cell,
    check_cells as check_cells,
    parse_grid as parse_grid,
    sweep_cells as sweep_cells,
)
from lagless.lab.sweep._sweep import sweep as sweep
