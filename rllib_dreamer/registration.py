"""What Tune and RLlib must know to find the algorithm and the environments by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.rllib.algorithms import registry
from ray.tune import register_trainable

from rllib_dreamer import envs

if TYPE_CHECKING:
    from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch

#: The name in `tune.Tuner("DreamerTorch", ...)` and `rllib train --run DreamerTorch`.
ALGORITHM_NAME = "DreamerTorch"


def register() -> None:
    """Registers the algorithm and the environments; may be called any number of times.

    Tune's own registry lies in the Ray cluster and is lost with `ray.shutdown()`. RLlib's
    list of algorithms lies in the process: Tune falls back to it for a name that it does
    not know, and our entry then registers the environments again too.
    """
    from rllib_dreamer.dreamer import DreamerTorch

    registry.ALGORITHMS[ALGORITHM_NAME] = _load
    register_trainable(ALGORITHM_NAME, DreamerTorch)
    envs.register_envs()


def _load() -> tuple[type[DreamerTorch], DreamerConfig]:
    """The entry in RLlib's list: the class and a default config."""
    from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch

    envs.register_envs()
    return DreamerTorch, DreamerConfig()
