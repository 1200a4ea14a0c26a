"""Rows of text, their clients and splits, and their encoding as token ids."""
