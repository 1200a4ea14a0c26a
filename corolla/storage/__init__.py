"""What a client keeps on its disk between rounds."""
