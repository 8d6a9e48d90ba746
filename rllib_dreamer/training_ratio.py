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
        self.steps_per_update = batch_steps / Fraction(str(ratio))
        self._accounted: Fraction | None = None

    def updates(self, agent_steps: int) -> int:
        """Returns the updates due at this many agent steps since the beginning of training.

        The first call gives one: steps taken before there was enough to learn from ask for none.
        """
        if self._accounted is None:
            self._accounted = Fraction(agent_steps)
            return 1
        due = int((agent_steps - self._accounted) / self.steps_per_update)
        self._accounted += due * self.steps_per_update
        return due

    def restart(self) -> None:
        """Begins anew with the next call: steps taken until then ask for no updates."""
        self._accounted = None

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes."""
        return {"accounted": None if self._accounted is None else str(self._accounted)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where another one stopped: neither a burst nor a gap of updates."""
        accounted = state["accounted"]
        self._accounted = None if accounted is None else Fraction(str(accounted))
