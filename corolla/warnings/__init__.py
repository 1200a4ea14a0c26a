"""Warnings of a run: settings that it does not read, and results that are harmful."""
