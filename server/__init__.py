"""The coordinator: rounds, aggregation, checkpoints, evaluation, and the Flower ServerApp."""
