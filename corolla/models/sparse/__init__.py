"""Sparse sets: values at fixed places of weight matrices, trained with all others as they were."""
