"""The gateway between a run and phones."""
