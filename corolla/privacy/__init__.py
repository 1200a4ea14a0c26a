"""Differential privacy: accounting, noise, clipping, and the ledger of what was spent."""
