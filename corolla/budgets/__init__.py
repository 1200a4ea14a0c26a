"""Choices of blocks and modules under a budget: costs, scores, and the best set."""
