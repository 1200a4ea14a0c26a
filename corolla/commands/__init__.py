"""The composition roots: each brings server and client together for one command."""
