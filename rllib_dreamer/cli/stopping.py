"""When a run ends: its stop condition, or Ctrl-C, both with a checkpoint at the end."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from types import FrameType
from typing import Any

from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.utils import flatten_dict

#: Short names accepted in `stop`, each with the result keys to look for, best first.
STOP_ALIASES: dict[str, tuple[str, ...]] = {
    "env_steps": ("dreamer/env_steps", "num_env_steps_sampled_lifetime"),
    "agent_steps": ("dreamer/agent_steps", "num_env_steps_sampled_lifetime"),
    "updates": ("dreamer/updates",),
    "iterations": ("training_iteration",),
    "seconds": ("time_total_s",),
    "episode_return_mean": ("env_runners/episode_return_mean",),
}


def lookup(result: Mapping[str, Any], name: str) -> float | None:
    """Finds a metric in a flat result.

    Args:
        result: A result whose nested keys are joined by "/".
        name: A full key, or a short name from `STOP_ALIASES`.

    Returns:
        Its value, or None if it is missing, no number or NaN.
    """
    for key in (name, *STOP_ALIASES.get(name, ())):
        value = result.get(key)
        if isinstance(value, Real) and not math.isnan(value):
            return float(value)
    return None


def unknown_metrics(result: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Finds the metrics that a result has no key for, so that no run stops by them.

    Args:
        result: A flat result, as of `lookup`.
        names: Full keys or short names. Those of evaluations, which not every result has, are
            never among the unknown ones.
    """
    return [
        name
        for name in names
        if not name.startswith("evaluation/")
        and not any(key in result for key in (name, *STOP_ALIASES.get(name, ())))
    ]


class StopCondition(Stopper):
    """Stops a trial at any of several limits, and all trials once asked to.

    A trial stops at the first result in which a metric is at or above its limit. A metric
    which a result does not have yet (no episode has ended) is not met.

    Args:
        limits: Metric names (full keys or `STOP_ALIASES`) and their limits.
    """

    def __init__(self, limits: Mapping[str, float]) -> None:
        self.limits = dict(limits)
        self.requested = False

    def request(self) -> None:
        """Asks every trial to stop at its next result."""
        self.requested = True

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tells whether this trial stops now; RLlib's nested result is flattened here."""
        if self.requested:
            return True
        flat = flatten_dict(result)
        values = ((lookup(flat, name), limit) for name, limit in self.limits.items())
        return any(value is not None and value >= limit for value, limit in values)

    def stop_all(self) -> bool:
        """Never: it would end trials between two results, without their last checkpoint."""
        return False


class StoppableScheduler(FIFOScheduler):
    """Tune's scheduler of trials in order, which starts none any more once asked to stop.

    Args:
        condition: Gets the request.
    """

    def __init__(self, condition: StopCondition) -> None:
        super().__init__()
        self.condition = condition

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Picks the next trial; Tune asks before it starts any."""
        if not self.condition.requested:
            return super().choose_trial_to_run(tune_controller)
        tune_controller.search_alg.set_finished()
        for trial in tune_controller.get_trials():
            if trial.status == Trial.PENDING:
                # Not `stop_trial`, which tells the loggers of the end of what never began.
                tune_controller._schedule_trial_stop(trial)
        return None


@contextmanager
def stop_on_signal(condition: StopCondition, notify: Callable[[], None]) -> Iterator[None]:
    """Turns the first Ctrl-C (or SIGTERM) into a clean stop; the second one aborts.

    Args:
        condition: Gets the request.
        notify: Called once, to tell the user.

    Yields:
        Nothing; the earlier handlers come back afterwards.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if condition.requested:
            raise KeyboardInterrupt
        condition.request()
        notify()

    numbers = (signal.SIGINT, signal.SIGTERM)
    earlier = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
