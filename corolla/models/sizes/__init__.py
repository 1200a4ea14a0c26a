"""Sizes of models that are known from their config.json alone."""
