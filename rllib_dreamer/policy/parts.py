"""What a policy is made of, whether it is read from a checkpoint or from an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym

from rllib_dreamer.model.agent import Agent


class PolicyParts(NamedTuple):
    """The parts of a `DreamerPolicy`.

    Attributes:
        agent: The trained agent, with all of its parts.
        observation_space: Of the module, which is the env's unless connectors change it.
        action_space: Of the env.
        conversion: How actions get the units of the env, see `action_units.CONVERSIONS`.
        env: The environment of the training, as in `config.environment(env)`; None if unknown.
        env_config: Its config.
        about: What else is known of where the policy comes from, by name.
    """

    agent: Agent
    observation_space: gym.Space
    action_space: gym.Space
    conversion: str
    env: Any
    env_config: Mapping[str, Any]
    about: Mapping[str, Any]
