"""Estimates of what training takes, by formula: nothing is loaded."""
