"""`corolla compare`: a grid of runs, their statistics, and a report."""
