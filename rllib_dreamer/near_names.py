"""What was meant by a name that was not found."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str], count: int = 3, cutoff: float = 0.5) -> str:
    """Names the nearest known words.

    Args:
        given: The word that was not found.
        known: All allowed words.
        count: How many words to name at most.
        cutoff: How alike they must be, in [0, 1].

    Returns:
        " (did you mean a, b?)", or "" when nothing is near.
    """
    near = _near(given, known, count, cutoff)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def nearest(given: str, known: Iterable[str], count: int = 5) -> str:
    """Returns "did you mean ..." with the known names closest to `given`, or the first few."""
    known = sorted(known)
    if near := _near(given, known, count, cutoff=0.5):
        return "did you mean " + ", ".join(map(repr, near)) + "?"
    return "known are " + ", ".join(map(repr, known[:count])) + (", ..." if known[count:] else "")


def _near(given: str, known: Iterable[str], count: int, cutoff: float) -> list[str]:
    folded = {name.lower(): name for name in sorted({str(name) for name in known})}
    near = difflib.get_close_matches(given.lower(), folded, n=count, cutoff=cutoff)
    return [folded[name] for name in near]
