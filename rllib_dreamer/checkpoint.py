"""Checkpoints that are whole or refused: a manifest of sizes and hashes, written last."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow.fs import FileSystem, LocalFileSystem, copy_files

from rllib_dreamer.atomic import write_text

MANIFEST = "manifest.json"
REPLAY_FOLDER = "replay"
_OF_REPLAY = f"{REPLAY_FOLDER}/"
"""With which the names of the replay's files begin."""
SCORE = "checkpoint_score"
"""Key of a result by which checkpoints are ranked."""
MARK = "rllib_dreamer"
"""Key of a checkpoint's `.metadata.json`, which is Tune's, for what `rllib train` adds."""
_UNFINISHED = ".unfinished"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def _digest(path: Path) -> str:
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((MANIFEST, "."))
    )


def _manifest(folder: Path) -> str:
    """The manifest of everything in `folder`."""
    entries = {}
    for path in _files(folder):
        entries[path.relative_to(folder).as_posix()] = [path.stat().st_size, _digest(path)]
    return json.dumps({"files": entries}, indent=0)


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """Gives a new folder to write a checkpoint to, and puts it into `folder`, sealed, at the end.

    Where a sealed checkpoint lies in `folder` already, the new folder is beside it, and takes its
    place once it is sealed. Else it is within `folder`: its files move up, then the manifest is
    written. Either way what else lies in `folder` is no part of the checkpoint and is kept, but for
    files of the same names. What was written is removed again if the checkpoint does not come to
    its end, so that it does not keep a full disk full; what a kill left of an earlier attempt goes
    with the next one.

    Raises:
        OSError: The checkpoint could not be written, naming the folder and the space left.
    """
    folder = Path(folder).resolve()
    over = (folder / MANIFEST).is_file()
    for place in (folder.parent, folder):
        for leftover in place.glob(f".{folder.name}.*{_UNFINISHED}"):
            shutil.rmtree(leftover, ignore_errors=True)
    name = f".{folder.name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}"
    fresh = (folder.parent if over else folder) / name
    target = fresh if over else folder
    kept = {target, *target.rglob("*")} if target.is_dir() else set()
    try:
        yield fresh
        manifest = _manifest(fresh)
        if over:
            write_text(fresh / MANIFEST, manifest)
            _take_over_others(folder, fresh)
            _exchange(fresh, folder)
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            _move_up(fresh)
            write_text(folder / MANIFEST, manifest)
    except OSError as error:
        explained = _explained(error, folder, fresh)
        _remove(target, kept)
        raise explained from error
    except BaseException:
        _remove(target, kept)
        raise


def refuse_around_replay(folder: Path, replay: str | Path | None) -> None:
    """Refuses to save into a folder that holds a run's replay on disk.

    Raises:
        ValueError: If the folder is that of the replay, or has it in it.
    """
    if replay is not None and not _escapes(Path(replay), folder):
        raise ValueError(
            f"replay_directory {str(replay)!r} lies in {folder}: a checkpoint there would take the "
            "place of the replay that training goes on with. Save into another folder, or set "
            "replay_directory to one outside of it."
        )


def _move_up(folder: Path) -> None:
    """Moves what is in a folder to the one around it, over files of the same names."""
    for path in sorted(folder.rglob("*")):  # folders before their files
        place = folder.parent / path.relative_to(folder)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            path.replace(place)
    shutil.rmtree(folder)


def _remove(folder: Path, kept: set[Path]) -> None:
    """Removes a folder with all that is in it, but for the files and folders `kept`."""
    for path in (*sorted(folder.rglob("*"), reverse=True), folder):  # files before their folders
        if path in kept or not path.exists():
            continue
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


def _take_over_others(folder: Path, fresh: Path) -> None:
    """Takes over the files of `folder` that belong to no checkpoint, where `fresh` has none."""
    ours = {*_entries(folder), MANIFEST}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and name.as_posix() not in ours and not (fresh / name).exists():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, fresh / name)  # so that who has it open writes on
            except OSError:
                shutil.copy2(path, fresh / name)


def _exchange(one: Path, other: Path) -> None:
    """Lets two folders change places, at once where the system can (Linux), else one by one."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = [_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)]
    if renameat2 is not None and renameat2(*paths, _RENAME_EXCHANGE) == 0:
        return
    between = one.with_name(f"{one.name}.old")
    other.rename(between)
    one.rename(other)
    between.rename(one)


def _explained(error: OSError, folder: Path, target: Path) -> OSError:
    """The error with what it means for the checkpoints, of the same number."""
    place = next(path for path in (target, *target.parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    text = (
        f"{error.strerror or error}: checkpoint {folder} could not be written. It got to "
        f"{written / 1e6:,.1f} MB with {free / 1e6:,.1f} MB free, and is removed; earlier "
        "checkpoints are whole. Make room, then save again or resume from the last one"
    )
    return OSError(text) if error.errno is None else OSError(error.errno, text)


def _entries(folder: Path) -> dict[str, list]:
    """Size and hash of each file that the manifest names."""
    entries: dict[str, list] = json.loads((folder / MANIFEST).read_text())["files"]
    return entries


def _escapes(path: Path, folder: Path) -> bool:
    """Whether a path, by "..", from the root or through links, ends outside of the folder."""
    return not path.resolve().is_relative_to(folder.resolve())


def has_replay(folder: str | Path) -> bool:
    """Whether a replay is part of a sealed checkpoint."""
    return any(name.startswith(_OF_REPLAY) for name in _entries(Path(folder)))


def problems(folder: str | Path, *, hashes: bool = True, without_replay: bool = False) -> list[str]:
    """Returns what is wrong with a sealed folder; nothing if it is whole.

    Args:
        folder: A checkpoint.
        hashes: Whether to read every file; else only sizes are compared.
        without_replay: Whether to pass over the replay, which may then be missing.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return [f"{MANIFEST} is missing: saving was not finished"]
    try:
        entries = _entries(folder)
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST} is damaged"]
    passed_over = (_OF_REPLAY,) if without_replay else ()
    links = [path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink()]
    escaping = [link.as_posix() for link in links if _escapes(folder / link, folder)]
    found = [f"{name} leads out of it" for name in escaping if not name.startswith(passed_over)]
    for name, (size, digest) in entries.items():
        path = folder / name
        if name.startswith(passed_over):
            continue
        if _escapes(path, folder):
            found.append(f"{name} leads out of it")
        elif not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif hashes and _digest(path) != digest:
            found.append(f"{name} is damaged")
    return found


def verify(folder: str | Path, *, hashes: bool = True, without_replay: bool = False) -> None:
    """Raises ValueError unless the checkpoint in `folder` is whole, as `problems` has it."""
    found = problems(folder, hashes=hashes, without_replay=without_replay)
    if found:
        raise ValueError(
            f"checkpoint {folder} is not complete: {'; '.join(found[:3])}. Use an earlier one."
        )


def is_complete(folder: str | Path, *, without_replay: bool = False) -> bool:
    """Whether `folder` is a checkpoint saved to its end, judged by names and sizes."""
    return not problems(folder, hashes=False, without_replay=without_replay)


@contextmanager
def on_this_machine(path: str | Path, filesystem: FileSystem | None = None) -> Iterator[Path]:
    """Gives the folder of a checkpoint on this machine: a copy, if it lies elsewhere.

    Args:
        path: The checkpoint: a folder or a URI.
        filesystem: Where the path is from; by default this machine, or where the URI says.
    """
    if filesystem is None and "://" in str(path):
        filesystem, path = FileSystem.from_uri(str(path))
    if filesystem is None or isinstance(filesystem, LocalFileSystem):
        yield Path(path).absolute()
        return
    with tempfile.TemporaryDirectory() as folder:
        copy_files(str(path), folder, source_filesystem=filesystem)
        yield Path(folder)
