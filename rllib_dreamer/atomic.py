"""Files that a kill leaves old or new, never in part."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step.

    Args:
        path: The file; `path.part` beside it holds the new text until it is complete.
        text: What it is to hold, written as UTF-8.

    Raises:
        OSError: If it cannot be written; the earlier file is then as it was.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
