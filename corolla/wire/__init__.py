"""What travels between server and clients, byte for byte."""
