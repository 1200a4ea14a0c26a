"""`python -m corolla`."""

from corolla.cli import app

app()
