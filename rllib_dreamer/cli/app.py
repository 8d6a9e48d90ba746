"""The commands of `rllib`, and how their errors reach the screen.

A further command is one line: `app.command()(its_function)`, or an entry in `lazy.COMMANDS` if
what it needs is slow to import or an extra.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer

from rllib_dreamer.cli.errors import CommandError, RunFailed
from rllib_dreamer.cli.lazy import LazyGroup
from rllib_dreamer.cli.train import train_app

app = typer.Typer(
    name="rllib",
    cls=LazyGroup,
    help="Train and use RLlib algorithms.",
    add_completion=False,
)
app.add_typer(train_app, name="train")


@app.command()
def version() -> None:
    """Print the versions of this package, Ray and PyTorch."""
    for name in ("rllib_dreamer", "ray", "torch"):
        module: Any = import_module(name)
        typer.echo(f"{name} {module.__version__}")


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        arguments: The words after `rllib`; those of the process by default.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 wrong usage, 130 stopped by Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    verbose = "-v" in words or "--verbose" in words
    command = typer.main.get_command(app)
    try:
        code = command.main(resume_without_path(words), prog_name="rllib", standalone_mode=False)
    except CommandError as error:
        return _report(str(error), 2, verbose)
    except RunFailed as error:
        return _report(str(error), 1, verbose)
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _report("aborted", 130, verbose=False)
    except Exception as error:
        # The exceptions of Click, which some versions of Typer carry inside themselves.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "rllib"
        text = " ".join(error.format_message().split()).rstrip(".")
        return _report(f"{text} (see {path} --help)", 2, verbose)
    return code if isinstance(code, int) else 0


def resume_without_path(words: list[str]) -> list[str]:
    """Gives a bare `--resume` an empty path, since an option's value cannot be left away.

    Args:
        words: The command line.

    Returns:
        The same, `--resume` followed by another option or by nothing as `--resume=`.
    """
    following = [*words, "-"][1:]
    return [
        "--resume=" if word == "--resume" and after.startswith("-") else word
        for word, after in zip(words, following, strict=True)
    ]


def _report(text: str, code: int, verbose: bool) -> int:
    """Prints one line to stderr, with `-v` the traceback before it."""
    if verbose:
        traceback.print_exc()
    print(f"rllib: {text}", file=sys.stderr)
    return code
