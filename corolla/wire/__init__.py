"""The messages that travel between server and clients, byte for byte."""
