"""Starts of an adapter, a file each: made of weights, of public rows, or of a folder."""
