"""Measures what tuning has changed beside its task: refusals, knowledge, language; per domain."""
