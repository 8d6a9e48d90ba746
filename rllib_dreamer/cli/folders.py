"""The folders that commands write to: each of one command alone, an experiment's marked and locked.

An experiment's folder holds a mark that says what it is a run of, by which `--resume` finds it, and
a lock while a command trains in it. The system lets go of the lock of a process that is killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from rllib_dreamer.atomic import write_text
from rllib_dreamer.cli.errors import CommandError
from rllib_dreamer.near_names import did_you_mean

_STATE_FILES = "experiment_state-*.json"
_MARK_FILE = "rllib_dreamer.txt"
_LOCK_FILE = "rllib_dreamer.lock"
_FIRST_FILES = {_LOCK_FILE, "tuner.pkl"}  # what a run writes before it can be resumed


class Mark(NamedTuple):
    """What an experiment is a run of.

    Attributes:
        name: The stem of the file, or algorithm and environment.
        file: The file's path; None without one.
    """

    name: str
    file: Path | None = None

    def __str__(self) -> str:
        """The words for messages."""
        return str(self.file or self.name)

    def allows(self, other: Mark) -> bool:
        """Whether an experiment with this mark is a run of `other`.

        A file at another path may be the same one, moved or on another machine, unless the one of
        the mark is still there.
        """
        if self.name != other.name:
            return False
        return self.file is None or self.file == other.file or not self.file.exists()


def read_mark(experiment: Path) -> Mark | None:
    """Reads the mark of an experiment, None if it has none."""
    try:
        lines = (experiment / _MARK_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return Mark(lines[0].strip(), Path(lines[1]) if lines[1:] else None) if lines else None


def write_mark(experiment: Path, mark: Mark) -> None:
    """Marks an experiment, unless it has a mark: that of its first session stays."""
    if read_mark(experiment) is None:
        text = "".join(f"{part}\n" for part in mark if part is not None)
        write_text(experiment / _MARK_FILE, text)


def make_folder(parent: Path, name: str) -> Path:
    """Makes a folder that is new, or takes one that a killed command made and did not use.

    Raises:
        CommandError: If it is in use or cannot be made.
    """
    folder = parent / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        if not _is_unused(folder):
            text = f"{folder} exists; add --resume, or choose another --name"
            raise CommandError(text) from error
    except OSError as error:
        raise CommandError(f"--name: {folder}: {error.strerror}") from error
    return folder


def make_dated_folder(parent: Path, prefix: str = "") -> Path:
    """Makes a new folder named by the time, numbered if another command has that second's name.

    Raises:
        OSError: If it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    name = f"{prefix}{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


@contextmanager
def holding(folders: Sequence[Path]) -> Iterator[Path]:
    """Keeps other commands out of the first of the folders that is free, for as long as it lasts.

    Where no file can be locked (a read-only or some remote storage) every folder counts as free.
    A folder in which nothing was written is removed at the end.

    Args:
        folders: Existing folders, at least one.

    Yields:
        The folder.

    Raises:
        CommandError: If other commands train in all of them.
    """
    for folder in folders:
        lock = FileLock(folder / _LOCK_FILE)
        try:
            if os.access(folder, os.W_OK):
                lock.acquire(timeout=0)
        except Timeout:
            continue
        except (OSError, NotImplementedError):  # a file system without locks
            pass
        break
    else:
        raise CommandError(
            f"another command trains in {folders[0]}; wait for its end or stop it (once by Ctrl-C, "
            "which saves a checkpoint), or take another experiment: --name NAME, --resume PATH"
        )
    try:
        yield folder
    finally:
        _remove_unused(folder)
        lock.release()


def _remove_unused(folder: Path) -> None:
    """Removes a folder that was not used, so that its name can be given again."""
    with suppress(OSError):
        if _is_unused(folder):
            for name in _FIRST_FILES:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def _is_unused(folder: Path) -> bool:
    """Whether a folder holds nothing of a run."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= _FIRST_FILES


def find_experiments(path: str, storage: Path, name: str | None, mark: Mark) -> list[Path]:
    """Finds the folders of the experiments that may be meant by `--resume`.

    Args:
        path: The value of `--resume`: an experiment, or a trial or checkpoint inside one;
            empty for the newest of this file or algorithm.
        storage: The folder of all experiments.
        name: The value of `--name`.
        mark: This file or algorithm.

    Returns:
        At least one folder, the newest first; only one if it was named.

    Raises:
        CommandError: If there is none, or the one that was named is of another file or algorithm.
    """
    if path or name is not None:
        folder = _experiment_at(Path(path)) if path else storage / str(name)
        if folder is None or not is_experiment(folder):
            raise CommandError(f"--resume: {_missing(path, storage, name)}")
        _check_mark(folder, mark)
        return [folder]
    found = [folder for folder in _experiments(storage) if _is_of(folder, mark)]
    if not found:
        raise CommandError(
            f"--resume: no experiment of {mark.name} in {storage}; say which: --resume PATH"
        )
    return sorted(found, key=_age, reverse=True)


def is_experiment(folder: Path) -> bool:
    """Whether a folder is that of an experiment which Tune has begun."""
    return folder.is_dir() and bool(state_files(folder))


def state_files(experiment: Path) -> list[Path]:
    """The state files of an experiment, one a session, newest first."""
    return sorted(experiment.glob(_STATE_FILES), reverse=True)


def _experiment_at(path: Path) -> Path | None:
    """The experiment that a path is, or that it lies in; None if there is none."""
    start = path.expanduser().resolve()
    return next((f for f in (start, *start.parents[:2]) if is_experiment(f)), None)


def _missing(path: str, storage: Path, name: str | None) -> str:
    """Says that the experiment named is not there, and which ones have names like it."""
    known = [folder.name for folder in _experiments(storage)]
    if not path:
        return f"no experiment {name!r} in {storage}{did_you_mean(str(name), known)}"
    start = Path(path).expanduser().resolve()
    problem = "holds no experiment" if start.is_dir() else "is no folder"
    return f"{start} {problem}{did_you_mean(start.name, known)}"


def _check_mark(experiment: Path, mark: Mark) -> None:
    """Refuses a run of another file: its state would be overwritten before anything is noticed."""
    found = read_mark(experiment)
    if found is not None and not found.allows(mark):
        raise CommandError(
            f"--resume: {experiment} is a run of {found}, not of {mark}; resume it with the "
            f"former, or remove {experiment / _MARK_FILE} to make it one of the latter"
        )


def _is_of(experiment: Path, mark: Mark) -> bool:
    found = read_mark(experiment)
    return found is not None and found.allows(mark)


def _age(experiment: Path) -> float:
    """When the state was written last, in seconds."""
    return max(file.stat().st_mtime for file in state_files(experiment))


def _experiments(storage: Path) -> list[Path]:
    """All experiments in a folder."""
    if not storage.is_dir():
        return []
    return [folder for folder in storage.iterdir() if is_experiment(folder)]
