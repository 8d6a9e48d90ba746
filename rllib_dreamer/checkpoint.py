"""Checkpoints that are whole or refused: a manifest of sizes and hashes, written last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"


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


def seal(folder: str | Path) -> None:
    """Writes the manifest of everything in `folder`, in one atomic step, after all the data."""
    folder = Path(folder)
    entries = {}
    for path in _files(folder):
        entries[path.relative_to(folder).as_posix()] = [path.stat().st_size, _digest(path)]
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("w") as file:
        json.dump({"files": entries}, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """Gives the folder to write a checkpoint to, and seals it at the end.

    Where a sealed checkpoint lies in `folder` already, this is a new folder beside it, which takes
    the old one's place once it is sealed. Files there that belong to no checkpoint are kept.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        yield folder
        seal(folder)
        return
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield fresh
        seal(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    old = fresh.with_name(f"{fresh.name}.old")
    ours = {*_entries(folder), MANIFEST}
    others = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    folder.rename(old)
    fresh.rename(folder)
    for name in others:
        if name.as_posix() not in ours and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(folder / name)
    shutil.rmtree(old)


def _entries(folder: Path) -> dict[str, list]:
    """Size and hash of each file that the manifest names."""
    entries: dict[str, list] = json.loads((folder / MANIFEST).read_text())["files"]
    return entries


def problems(folder: str | Path, *, hashes: bool = True) -> list[str]:
    """Returns what is wrong with a sealed folder; nothing if it is whole.

    Args:
        folder: A checkpoint.
        hashes: Whether to read every file; else only sizes are compared.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return [f"{MANIFEST} is missing: saving was not finished"]
    found: list[str] = []
    for name, (size, digest) in _entries(folder).items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif hashes and _digest(path) != digest:
            found.append(f"{name} is damaged")
    return found


def verify(folder: str | Path) -> None:
    """Raises ValueError unless the checkpoint in `folder` is whole."""
    found = problems(folder)
    if found:
        raise ValueError(
            f"checkpoint {folder} is not complete: {'; '.join(found[:3])}. Use an earlier one."
        )


def is_complete(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint saved to its end, judged by names and sizes."""
    return not problems(folder, hashes=False)
