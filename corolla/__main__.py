"""`python -m corolla`."""

from corolla.cli.app import app

app()
