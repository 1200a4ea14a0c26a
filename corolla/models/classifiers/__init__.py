"""Heads of classifiers: what a checkpoint lacks of them, and those that are drawn anew."""
