"""Edits saved adapters: read and checked, taken through steps, written as one with a record."""
