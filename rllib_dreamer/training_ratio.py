"""How many updates are due: the training ratio, held exactly."""

from __future__ import annotations

from fractions import Fraction
from typing import Any


class TrainingRatio:
    """Counts agent steps into updates and carries the remainder over (official `when.Ratio`).

    Counts in fractions: sums of floating-point numbers would be one update off now and then.

    Args:
        ratio: Replayed steps per agent step, > 0.
        batch_steps: Steps that one update replays, B * T.
    """

    def __init__(self, ratio: float, batch_steps: int) -> None:
        self._updates_per_step = Fraction(str(ratio)) / batch_steps
        self._counted: int | None = None  # agent steps, at the latest call
        self._owed = Fraction(0)  # of an update, < 1

    def updates(self, agent_steps: int) -> int:
        """Returns the updates due at this many agent steps since the beginning of training.

        The first call gives one: steps taken before there was enough to learn from ask for none.
        """
        counted, self._counted = self._counted, agent_steps
        if counted is None:
            return 1
        self._owed += (agent_steps - counted) * self._updates_per_step
        due = int(self._owed)
        self._owed -= due
        return due

    def restart(self) -> None:
        """Begins anew with the next call: steps taken until then ask for no updates."""
        self._counted, self._owed = None, Fraction(0)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes."""
        return {"counted": self._counted, "owed": str(self._owed)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where another one stopped: neither a burst nor a gap, at another ratio too."""
        self._counted, self._owed = state["counted"], Fraction(state["owed"])
