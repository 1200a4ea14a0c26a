"""Keys of a run: a section a file, what may be a value of each, and the kinds of parameters."""
