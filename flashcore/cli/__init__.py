"""The ``flashcore`` command: measure, look at an installation, compile ahead of time, explain a plan.

One module for each command. Heavy imports (torch, CUDA) happen inside the commands that need them, so that ``--help``
is quick and ``doctor`` answers on a machine where they are broken.
"""

import re
from typing import Annotated

import typer
from typer.core import TyperGroup

from flashcore import __version__
from flashcore.cli import bench, cache, compile, doctor, explain, explain_matmul, profile, report
from flashcore.cli.console import fail
from flashcore.errors import FlashCoreError


class Sentences(TyperGroup):
    """The one place that makes a sentence and exit code 2 of what a user can mend, instead of a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # nobody reads on: click ends quietly
            raise
        except FlashCoreError as error:
            raise fail(str(error)) from None
        except re.error as error:
            raise fail(f"{error.pattern!r} is not a regular expression: {error}") from None
        except OSError as error:
            names = ": ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
            raise fail(f"{names}: {error.strerror}" if names and error.strerror else str(error)) from None
        except ImportError as error:
            raise fail(f"{error}. flashcore doctor says what works here.") from None


app = typer.Typer(
    cls=Sentences,
    help="FlashCore: measure, diagnose, compile ahead of time, explain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flashcore {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(bench.bench)
app.command(name="compile")(compile.compile_kernels)
app.command()(doctor.doctor)
app.command()(cache.cache)
app.command()(explain.explain)
app.command()(explain_matmul.explain_matmul)
app.command()(profile.profile)
app.command()(report.report)
