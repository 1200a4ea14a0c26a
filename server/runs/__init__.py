"""A run and its folder: journal, checkpoints, evaluation and reports."""
