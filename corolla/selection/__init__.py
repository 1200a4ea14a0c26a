"""Scores of weights' values, by which the places of a sparse set are chosen."""
