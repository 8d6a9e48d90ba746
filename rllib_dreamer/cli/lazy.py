"""Commands that are imported when they are used: they need an extra of this package."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from rllib_dreamer.cli.errors import CommandError

COMMANDS = {
    "evaluate": ("rllib_dreamer.cli.evaluate", "evaluate_command"),
    "plot": ("rllib_dreamer.cli.plot", "plot"),
}
"""Name -> module and function."""

_OURS = "rllib_dreamer"


class LazyGroup(TyperGroup):
    """The commands of `rllib`, those of `COMMANDS` among them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, for the help."""
        return [*super().list_commands(ctx), *COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, imported now if it is one of `COMMANDS`."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            self.commands[cmd_name] = _load(cmd_name)
        return super().get_command(ctx, cmd_name)


def _load(name: str) -> Any:
    """Imports a command; where its extra is missing, a stand-in says so when it is used."""
    module, function = COMMANDS[name]
    try:
        found = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if str(error.name).startswith(_OURS):
            raise
        return _command(name, _missing(name, str(error.name)), add_help_option=False)
    return _command(name, found)


def _command(name: str, function: Any, **options: Any) -> Any:
    app = typer.Typer(add_completion=False)
    anything = {"ignore_unknown_options": True, "allow_extra_args": True} if options else None
    app.command(name, context_settings=anything, **options)(function)
    return typer.main.get_command(app)


def _missing(name: str, package: str) -> Any:
    def missing(words: typer.Context) -> None:
        raise CommandError(
            f"{name} needs {package}, which is not installed; type: "
            'pip install "rllib-dreamer[eval]"'
        )

    missing.__doc__ = 'Not installed: pip install "rllib-dreamer\\[eval]".'
    return missing
