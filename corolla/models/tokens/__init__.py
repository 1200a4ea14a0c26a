"""Tokens of a run's own, and the rows of tables that are trained for them."""
