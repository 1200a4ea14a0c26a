"""Heads of classifiers that are drawn anew."""
