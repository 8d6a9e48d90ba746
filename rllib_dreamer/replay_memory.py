"""Whether a replay in memory will fit once it is full, beside those of other processes."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import uuid
import weakref
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

GB = 1e9
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    (".", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _cgroup_available(root: Path) -> list[int]:
    """Free bytes under each memory limit (cgroup v2 or v1) found at `root`; empty without one."""
    available = []
    for folder, limit_name, usage_name, reclaimable_name in _CGROUP_FILES:
        limit_file, usage_file = root / folder / limit_name, root / folder / usage_name
        if not (limit_file.is_file() and usage_file.is_file()):
            continue
        limit = limit_file.read_text().strip()
        if limit == "max" or int(limit) >= 2**60:  # v1 writes "no limit" as a huge number
            continue
        stat_file = root / folder / "memory.stat"
        lines = stat_file.read_text().splitlines() if stat_file.is_file() else []
        stat = dict(line.split()[:2] for line in lines if " " in line)
        usage = int(usage_file.read_text()) - int(stat.get(reclaimable_name, 0))
        available.append(max(0, int(limit) - usage))
    return available


def available_memory(cgroup_root: Path = _CGROUP_ROOT) -> int:
    """Returns the bytes of memory this process may still take: the machine's or its container's."""
    return min([psutil.virtual_memory().available, *_cgroup_available(cgroup_root)])


def check_memory(nbytes: int, capacity: int | None = None, available: int | None = None) -> None:
    """Refuses a replay that would not fit into memory once it is full.

    Args:
        nbytes: Bytes of the full replay.
        capacity: Its capacity in steps; with it the message can name one that fits.
        available: Bytes to compare with; by default `available_memory()`.

    Raises:
        ValueError: The replay needs more than there is.
    """
    available = available_memory() if available is None else available
    if nbytes <= available:
        return
    given = "" if capacity is None else f" {capacity:,} (steps)"
    fits = "" if capacity is None else f" to at most {int(0.9 * capacity * available / nbytes):,}"
    raise ValueError(
        f"replay_capacity{given} needs {nbytes / GB:.1f} GB of memory when full, but only "
        f"{available / GB:.1f} GB are available: lower it{fits}, choose a smaller "
        "model_size or image, or keep the replay on disk by replay_storage='disk'"
    )


class MemoryClaim:
    """Says to the other processes of this machine how much memory a replay will take.

    The memory of a replay is taken step by step, so what is available says nothing about the
    replays of other trials. Each leaves a note, and whoever comes reads those of living processes.
    The note goes away with the object.

    Args:
        nbytes: Bytes of the full replay.
        folder: Of the notes; by default one of the user's in the folder for temporary files.
    """

    def __init__(self, nbytes: int, folder: Path | None = None) -> None:
        user = os.getuid() if hasattr(os, "getuid") else 0
        self._folder = folder or Path(tempfile.gettempdir()) / f"rllib_dreamer_replays_{user}"
        self._folder.mkdir(exist_ok=True)
        self._note = self._folder / f"{uuid.uuid4().hex}.json"
        process = psutil.Process()
        note = {"pid": process.pid, "started": process.create_time(), "nbytes": nbytes}
        self._note.write_text(json.dumps(note))
        self._nbytes = nbytes
        weakref.finalize(self, self._note.unlink, missing_ok=True)

    def others(self) -> list[int]:
        """Bytes that each replay of another process may still take, at least."""
        found = (_still_to_take(note) for note in self._folder.glob("*.json"))
        return [nbytes for nbytes in found if nbytes is not None]

    def warn(self, available: int | None = None) -> None:
        """Logs a warning if all replays together need more memory than is available."""
        others = self.others()
        available = available_memory() if available is None else available
        needed = self._nbytes + sum(others)
        if others and needed > available:
            logger.warning(
                "The replays of this process and of others on this machine (%d) will need "
                "%.1f GB more when full, but only %.1f GB are available: lower replay_capacity, "
                "run fewer trials at once, or set replay_storage='disk'.",
                len(others),
                needed / GB,
                available / GB,
            )


def _still_to_take(note: Path) -> int | None:
    """What the replay of a note needs beyond its process's memory; None if ours or gone."""
    try:
        found = json.loads(note.read_text())
        process = psutil.Process(found["pid"])
        if process.create_time() != found["started"]:
            raise psutil.NoSuchProcess(found["pid"])
        if process.pid == os.getpid():
            return None
        return max(0, int(found["nbytes"]) - process.memory_info().rss)
    except psutil.NoSuchProcess:
        note.unlink(missing_ok=True)
    except (OSError, ValueError, psutil.Error):  # just being written or removed
        pass
    return None
