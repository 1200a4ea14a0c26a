"""The settings of a run, and the rules that they keep."""
