"""Local training: first order, zeroth order, and both under differential privacy."""
