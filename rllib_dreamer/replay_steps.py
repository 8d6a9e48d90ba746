"""Turns RLlib's episodes into steps of the replay: which number belongs to which observation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.utils.spaces.space_utils import batch as batch_structs

from rllib_dreamer.box_checks import LARGEST_REWARD, is_finite, not_finite
from rllib_dreamer.replay_storage import Column, to_half
from rllib_dreamer.spaces import flatten, leaf_spaces

if TYPE_CHECKING:
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode
    from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer


def _read(buffer: InfiniteLookbackBuffer) -> tuple[Any, int]:
    """Returns the values of an episode's buffer as (nested) arrays and where its own ones begin."""
    if buffer.finalized:
        return buffer.data, buffer.lookback
    values = buffer.data[buffer.lookback :]
    return (batch_structs(values) if values else values), 0


def _first_reward(episode: SingleAgentEpisode, carried_reward: float | None) -> float:
    """Returns the reward that arrived with the first observation of an episode chunk."""
    if episode.t_started == 0:
        return 0.0
    if episode.rewards.lookback > 0:
        return float(episode.rewards.data[episode.rewards.lookback - 1])
    if carried_reward is None:
        raise ValueError(
            f"episode {episode.id_} goes on at env step {episode.t_started} but does not say which "
            "reward came with that observation: set "
            "config.env_runners(episode_lookback_horizon=1) or higher"
        )
    return carried_reward


def _fill(name: str, column: Column, values: Any, count: int, filled: int) -> np.ndarray:
    """Returns (count, *shape) steps of a column: the first `filled` of `values`, then zeros."""
    values = np.asarray(values)[:filled]
    if values.shape != (filled, *column.shape):
        raise ValueError(
            f"replay column {name!r} takes {column.shape} for each of {filled} steps, the episode "
            f"gives {values.shape}: the env must send what its spaces say"
        )
    if filled == count:
        return values.astype(column.dtype, copy=False)
    out = np.zeros((count, *column.shape), column.dtype)
    out[:filled] = values
    return out


def _check_values(
    valid: np.ndarray, name: str, values: np.ndarray, episode: SingleAgentEpisode
) -> None:
    """Refuses a chunk with a value that is not `valid`, naming the first one."""
    if valid.all():
        return
    place = tuple(np.argwhere(~valid)[0])
    raise ValueError(
        f"replay column {name!r} has {values[place]} at env step "
        f"{episode.t_started + int(place[0])} of episode {episode.id_}, allowed are finite numbers "
        "of 32 bits and, in observations whose space begins there, -inf for a missing value: mend "
        "the env; nothing of this chunk was stored"
    )


def _rewards(episode: SingleAgentEpisode, first_reward: float, count: int) -> np.ndarray:
    """Returns the (count,) rewards that arrived with the observations; also checks the last one.

    The last reward of a chunk that goes on belongs to the next chunk's first step.
    """
    values, first = _read(episode.rewards)
    rewards = np.empty(len(episode) + 1)
    rewards[0], rewards[1:] = first_reward, values[first:]
    valid = np.abs(rewards) <= LARGEST_REWARD  # False for NaN, too
    _check_values(valid, "reward", rewards, episode)
    return rewards[:count].astype(np.float32)


def episode_steps(
    episode: SingleAgentEpisode,
    observation_space: gym.Space,
    action_space: gym.Space,
    layout: Mapping[str, Column],
    *,
    carried_reward: float | None = None,
) -> dict[str, np.ndarray]:
    """Converts an episode, or a chunk of one, to replay steps.

    A chunk of n env steps has n + 1 observations. The last one of a chunk that goes on has not
    been acted upon yet: it is left to the next chunk, and n steps come out. A chunk that ends its
    episode gives n + 1 steps; the last has `is_last`, `is_terminal` unless it was truncated, and
    zeros for action and latents, which are never used because the next step is a first one.

    Args:
        episode: The chunk; it is not changed. `extra_model_outputs` must hold STATE_OUT.
        observation_space: The env's observation space.
        action_space: The env's action space.
        layout: Columns, from `step_layout`.
        carried_reward: The reward that arrived with the first observation of a chunk which goes on
            with an episode, used where the episode's lookback does not hold it.

    Returns:
        One array of shape (n or n + 1, ...) for each column; they may share memory with `episode`.

    Raises:
        ValueError: Something does not fit the layout, a reward or an observation is not finite (see
            `box_checks`), or latents or the first reward are missing.
    """
    length, done = len(episode), bool(episode.is_done)
    count = length + done
    if Columns.STATE_OUT not in episode.extra_model_outputs:
        raise ValueError(
            f"episode {episode.id_} has no {Columns.STATE_OUT!r} in extra_model_outputs, got "
            f"{sorted(episode.extra_model_outputs)}: the replay stores the latents of each step: "
            "sample with the RLModule and not with random_actions=True"
        )
    steps: dict[str, np.ndarray] = {}
    observations, first = _read(episode.observations)
    for key, value in flatten(observations, observation_space).items():
        name = f"obs/{key}"
        steps[name] = _fill(name, layout[name], value[first:], count, count)
        if not_finite(steps[name], None):
            leaf = leaf_spaces(observation_space)[key]
            assert isinstance(leaf, gym.spaces.Box)
            _check_values(is_finite(steps[name], leaf), name, steps[name], episode)
    actions, first = _read(episode.actions)
    for key, value in flatten(actions, action_space, root="action").items():
        name = f"action/{key}"
        steps[name] = _fill(name, layout[name], value[first:], count, length)
    steps["reward"] = _rewards(episode, _first_reward(episode, carried_reward), count)
    for name in ("is_first", "is_last", "is_terminal"):
        steps[name] = np.zeros(count, np.bool_)
    steps["is_first"][0] = episode.t_started == 0
    steps["is_last"][-1] = done
    steps["is_terminal"][-1] = done and episode.is_terminated
    state, first = _read(episode.extra_model_outputs[Columns.STATE_OUT])
    latents = {
        "deter": to_half(np.asarray(state["deter"][first:])),
        "stoch": np.maximum(state["stoch"][first:], 0),  # -1 stands for the zero state
    }
    for name, value in latents.items():
        steps[name] = _fill(name, layout[name], value, count, length)
    return steps
