"""Aggregation strategies: one file per algorithm, both halves of its paper in it."""
