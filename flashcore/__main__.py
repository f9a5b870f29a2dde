"""``python -m flashcore`` is the ``flashcore`` command."""

from flashcore.cli import app

app(prog_name="flashcore")
