"""The ``flashcore`` command, also as ``python -m flashcore``."""

import sys


def main() -> None:
    try:
        from flashcore.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("rich", "typer"):
            raise
        sys.exit("The flashcore command needs typer and rich: pip install 'flashcore-attention[cli]'")
    app(prog_name="flashcore")


if __name__ == "__main__":
    main()
