"""Ports an adapter to another version of its base: compared, measured, refused where it harms."""
