from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from tiny import MIXED, RandomEnv, agent_of, assert_same, built, tiny_config, train_until

from rllib_dreamer.dreamer import DreamerTorch
from rllib_dreamer.model import kernels
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.spaces import canonical, flatten, leaf_spaces

BOUNDS = np.array([-3, 0.5], np.float32), np.array([7, 0.75], np.float32)
ACTIONS = spaces.Dict({"move": spaces.Box(*BOUNDS), "pick": spaces.MultiDiscrete([2, 3])})


class RecordingEnv(RandomEnv):
    """Keeps what it was told to do; the second environment has shorter episodes."""

    made: list[RecordingEnv]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.actions: list[Any] = []
        self.length -= 2 * len(self.made)
        self.made.append(self)

    def step(self, action: Any) -> Any:
        self.actions.append(action)
        return super().step(action)


@pytest.fixture
def algo() -> Iterator[DreamerTorch]:
    RecordingEnv.made = []
    config = tiny_config(RecordingEnv, observation_space=MIXED, action_space=ACTIONS, length=7)
    with built(config.env_runners(num_envs_per_env_runner=2)) as algo:
        train_until(algo, 3)
        algo.env_runner.module.agent.noise = FixedNoise(0.5)
        yield algo


def act_by_hand(agent: Agent, episode: Any, explore: bool) -> list[tuple[dict, dict]]:
    """Actions and states of the bare agent along the observations of an episode."""
    state, steps = agent.initial_state(1), []
    observations = episode.get_observations()
    for t in range(len(episode)):
        obs = {key: values[t] for key, values in observations.items()}
        leaves = {
            key: torch.as_tensor(canonical(np.asarray(leaf)[None], leaf_spaces(MIXED)[key]))
            for key, leaf in flatten(obs, MIXED).items()
        }
        actions, state = agent.act(leaves, state, explore)
        steps.append((actions, state._asdict()))
    return steps


@pytest.mark.parametrize("explore", [True, False])
def test_the_state_passes_through_the_connectors(algo: DreamerTorch, explore: bool) -> None:
    runner = algo.env_runner
    runner.sample(num_timesteps=1, explore=explore, force_reset=True)
    episodes = runner.sample(num_episodes=6, explore=explore)
    assert {len(e) for e in episodes} == {5, 7}
    for episode in episodes:
        expected = act_by_hand(runner.module.agent, episode, explore)
        states = episode.get_extra_model_outputs(Columns.STATE_OUT)
        actions = episode.get_actions()
        for t, (action, state) in enumerate(expected):
            for key in ("move", "pick"):
                np.testing.assert_allclose(actions[key][t], action[key][0], atol=1e-5)
            for key in ("deter", "action"):
                np.testing.assert_allclose(states[key][t], state[key][0], atol=1e-5)
            np.testing.assert_array_equal(states["stoch"][t], state["stoch"][0])


def test_without_exploration_actions_are_modes(algo: DreamerTorch) -> None:
    runner = algo.env_runner
    for explore, eps in ((False, 0.0), (True, 0.5)):
        episode = runner.sample(num_episodes=2, explore=explore)[0]
        states = episode.get_extra_model_outputs(Columns.STATE_OUT)
        agent = runner.module.agent
        classes = agent.world.config.classes
        stoch = torch.nn.functional.one_hot(torch.as_tensor(states["stoch"]).long(), classes)
        feat = torch.cat([torch.as_tensor(states["deter"]), stoch.flatten(1).float()], -1)
        with torch.no_grad():
            dists = agent.behavior.actor(feat)
        move = dists["move"].mean + eps * dists["move"].std
        np.testing.assert_allclose(episode.get_actions()["move"], move, atol=1e-5)
        np.testing.assert_array_equal(episode.get_actions()["pick"], dists["pick"].mode())


def test_the_environment_gets_scaled_actions_in_its_own_nesting(algo: DreamerTorch) -> None:
    runner = algo.env_runner
    runner.sample(num_timesteps=1, explore=True, force_reset=True)
    for env in RecordingEnv.made:
        env.actions.clear()
    episodes = runner.sample(num_episodes=2, explore=True)
    low, high = BOUNDS
    for episode in episodes:
        env = next(e for e in RecordingEnv.made if e.length == len(episode))
        chosen = episode.get_actions()
        clipped = np.clip(chosen["move"], -1, 1)
        for t, action in enumerate(env.actions[: len(episode)]):
            assert set(action) == {"move", "pick"}
            expected = low + (clipped[t] + 1) / 2 * (high - low)
            np.testing.assert_allclose(action["move"], expected, atol=1e-5)
            np.testing.assert_array_equal(action["pick"], chosen["pick"][t])


def test_env_runners_hold_only_what_acting_needs(algo: DreamerTorch) -> None:
    agent, whole = algo.env_runner.module.agent, agent_of(algo)
    for part in Agent.LEARNING_PARTS:
        assert agent.get_submodule(part.rpartition(".")[0]) is not None
        assert (
            getattr(agent.get_submodule(part.rpartition(".")[0]), part.rpartition(".")[2]) is None
        )
    acting, learning = agent.state_dict(), whole.state_dict()
    assert acting.keys() < learning.keys()
    state = algo.learner_group.get_state(components="learner/rl_module", inference_only=True)
    sent = state["learner"]["rl_module"][DEFAULT_MODULE_ID]
    assert {key.removeprefix("agent.") for key in sent} == acting.keys()
    assert sum(x.size for x in sent.values()) < 0.7 * sum(x.numel() for x in learning.values())
    assert_same(dict(acting), {key: learning[key] for key in acting})


def test_the_initial_state_has_no_batch_axis(algo: DreamerTorch) -> None:
    state = algo.env_runner.module.get_initial_state()
    assert {key: tuple(x.shape) for key, x in state.items()} == {
        "deter": (64,),
        "stoch": (4,),
        "action": (2 + 2 * 3,),
    }
    assert state["stoch"].eq(-1).all()


@pytest.mark.parametrize("compile", [True, False])
def test_acting_and_learning_are_fused_or_not(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By native kernels, where they can be built; never with compile=False."""
    used = []
    native = kernels.norm_silu
    monkeypatch.setattr(kernels, "norm_silu", lambda *args: used.append(0) or native(*args))
    with built(tiny_config(training={"compile": compile})) as algo:
        algo.env_runner.sample(num_timesteps=1)
        assert bool(used) == compile
        used.clear()
        train_until(algo, 1)
        assert bool(used) == compile
        assert agent_of(algo).fuse is algo.env_runner.module.agent.fuse is compile
