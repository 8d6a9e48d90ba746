"""RLlib's recipe for several learners: the settings of one, and what they are for n of them.

Batch and number of environments grow n times, so that each learner has the work that one had, and
learning rates sqrt(n) times. A fixed rate may rise from the old to the new one over the first tenth
of a run (the gradual warm-up of Goyal et al. 2017, arXiv:1706.02677, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rllib_dreamer.part_rates import PARTS
from rllib_dreamer.setting_ranges import is_count, is_rate

WARMUP_SHARE = 0.1
RATES = ("lr", *(f"{part}_lr" for part in PARTS))
_DIGITS = 6


class Scaled(NamedTuple):
    """A setting for one learner, and the one that scaling made of it."""

    one: Any
    several: Any


def scale_rate(rate: Any, learners: int, total_steps: int | None = None) -> Any:
    """Returns a learning rate for several learners.

    Args:
        rate: A number, one of RLlib's schedules [[agent steps, rate], ...], or None.
        learners: Their number, n; the rate is multiplied by sqrt(n).
        total_steps: Agent steps of the run; a number then becomes a schedule that rises from it
            over the first tenth. None gives the full rate at once.

    Returns:
        A number, a schedule, or None, as given.
    """
    if rate is None:
        return None
    factor = math.sqrt(learners)
    if isinstance(rate, list | tuple):
        return [[step, _rounded(value * factor)] for step, value in rate]
    scaled = _rounded(rate * factor)
    if total_steps is None or learners == 1:
        return scaled
    return [[0, rate], [max(1, round(WARMUP_SHARE * total_steps)), scaled]]


def _rounded(rate: float) -> float:
    """Without the noise of floating point, so that a person can read it."""
    return float(f"{rate:.{_DIGITS}g}")


def scale_config(
    config: AlgorithmConfig,
    scaled: dict[str, Scaled],
    learners: int,
    total_steps: int | None = None,
) -> str:
    """Changes the settings of a config for one learner to those for several.

    Args:
        config: A `DreamerConfig`, changed in place.
        scaled: What earlier calls made, by the name of the setting; changed in place. A setting is
            scaled from what it was before them, and stays as it is if it was changed since.
        learners: Their number.
        total_steps: Of `scale_rate`.

    Returns:
        What was set and what was left alone, a line each.

    Raises:
        ValueError: If a number is out of range, or a setting to scale is a search of Tune or a
            malformed schedule.
    """
    _check_count("num_learners", learners)
    if total_steps is not None:
        _check_count("total_steps", total_steps)
    recipe = _recipe(learners, total_steps)
    settings = vars(config)  # not getattr: the rate of a part, where none is set, reads as `lr`
    for name in recipe:
        _check_scalable(name, settings[name])
    lines = [f"settings for {learners} learners:"]
    for name, scale in recipe.items():
        now = settings[name]
        before = scaled.get(name, Scaled(now, now))
        if now != before.several:
            lines.append(f"  {name} stays {now!r}, to which it was set after scaling")
            continue
        new = scale(before.one)
        scaled[name] = Scaled(before.one, new)
        setattr(config, name, new)
        if new != now:
            lines.append(f"  {name} {now!r} -> {new!r}")
    if learners > 1 and not config.num_gpus_per_learner:
        lines.append("  num_gpus_per_learner is 0: every learner computes on the CPU")
    return "\n".join(lines)


def _recipe(learners: int, total_steps: int | None) -> dict[str, Callable[[Any], Any]]:
    """How each setting for one learner is scaled, by name."""
    return {
        "num_learners": lambda one: one if learners == 1 else learners,
        "batch_size_B": lambda one: one * learners,
        "num_envs_per_env_runner": lambda one: one * learners,
        **{name: lambda one: scale_rate(one, learners, total_steps) for name in RATES},
    }


def _check_scalable(name: str, value: Any) -> None:
    if value is None or is_rate(value):
        return
    if isinstance(value, list | tuple):
        raise ValueError(
            f"{name}={value!r} cannot be scaled: a schedule is a list of pairs of a step and a "
            "rate, like [[0, 4e-5], [1_000_000, 1e-5]]."
        )
    raise ValueError(
        f"{name}={value!r} cannot be scaled, only a number or a schedule can: call "
        "scale_to_learners first and set the search afterwards."
    )


def _check_count(name: str, value: Any) -> None:
    if not is_count(value, 1):
        raise ValueError(f"{name}={value!r} must be a whole number >= 1.")
