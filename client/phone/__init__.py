"""A phone that speaks to a gateway, in Python."""
