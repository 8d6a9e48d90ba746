"""Files that take the place of earlier ones together, or not at all where writing fails."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".unfinished"
"""Folder within the target that files are written to; a kill leaves it there."""


def check_target(folder: Path, mark: str) -> None:
    """Refuses a folder that somebody keeps other things in.

    Args:
        folder: Where an export is to go.
        mark: The file by which an earlier one is known.

    Raises:
        ValueError: It is neither new, empty, nor that of an earlier export, or is a file.
    """
    if not folder.exists():
        return
    ours = (folder / mark).is_file() or (folder / _UNFINISHED).is_dir()
    if not folder.is_dir() or (any(folder.iterdir()) and not ours):
        raise ValueError(
            f"path: {folder} is not empty and holds no exported policy: give a new or empty "
            "folder, or that of an earlier export."
        )


@contextmanager
def taking_place(folder: Path, mark: str, names: Collection[str]) -> Iterator[Path]:
    """Gives a folder to write files to; at the end they move to `folder`.

    Until then, and if writing fails, an earlier export there is as it was. Whoever is killed while
    files move leaves none, as the mark goes first and comes last. Other files there are kept.

    Args:
        folder: The target, made if need be.
        mark: The file by which a whole export is known.
        names: Every file that an export may have; what is not written anew goes.
    """
    is_new, fresh = not folder.exists(), folder / _UNFINISHED
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        (folder / mark).unlink(missing_ok=True)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for path in sorted(fresh.iterdir(), key=lambda path: path.name == mark):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
