"""The `rllib` command.

Imports nothing heavy: worker processes load single modules of this package.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits.

    Args:
        arguments: The words after `rllib`; those of the process by default.

    Raises:
        SystemExit: Always. 0 done, 1 the run failed, 2 wrong usage, 130 stopped by Ctrl-C.
    """
    from rllib_dreamer.cli.app import run

    raise SystemExit(run(arguments))
