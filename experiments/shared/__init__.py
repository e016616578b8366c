"""What studies share: cells that are computed once, their data, training, evaluation and averaging weights."""
