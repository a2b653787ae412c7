"""`python -m rayseg`: the command line."""

from rayseg.cli import app

app()
