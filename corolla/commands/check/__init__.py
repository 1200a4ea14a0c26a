"""`corolla check`: proofs that a strategy aggregates what it says."""
