"""Files, folders and sets of the hub as rows: containers, encodings, names of columns."""
