"""The files that a client keeps on its disk between rounds."""
