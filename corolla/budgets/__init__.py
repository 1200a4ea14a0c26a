"""Which blocks and modules are trained under a budget: costs, scores, and the best set."""
