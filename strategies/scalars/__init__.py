"""Strategies whose clients send scalars: steps along random directions that a seed tells."""
