"""Env runners and envs that die, raise or lie: what reaches the replay, and who is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import CountingEnv, assert_same, built, tiny_config, train_until

from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch
from rllib_dreamer.training_ratio import TrainingRatio


class FaultyEnv(CountingEnv):
    """Does what `config["fault"]` says once, at step 30 of an env's life."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.fault = config["fault"]
        self.life = 0

    def step(self, action: np.ndarray) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.life += 1
        if self.life == 30:
            if self.fault == "raise":
                raise OSError("camera lost")
            if self.fault == "nan observation":
                obs[1] = np.nan
            if self.fault == "nan reward":
                reward = np.nan
            if self.fault == "shape":
                obs = obs[:2]
        return obs, reward, terminated, truncated, info


def check_replay(algo: DreamerTorch) -> None:
    """Checks that no sequence is torn: time goes on by one, rewards belong to their actions."""
    for _ in range(20):
        batch = algo.replay.sample()
        t = np.rint(batch["obs/vector"][..., 0] * 10)
        first, last = batch["is_first"][:, 1:], batch["is_last"][:, :-1]
        np.testing.assert_array_equal(first, last)
        np.testing.assert_array_equal(np.diff(t)[~first], 1)
        np.testing.assert_array_equal(t[:, 1:][first], 0)
        earned = batch["action/action"].clip(-1, 1).sum(-1)[:, :-1]  # as the env gets them
        np.testing.assert_allclose(batch["reward"][:, 1:][~first], earned[~first], atol=1e-5)


def check_counters(algo: DreamerTorch, result: dict[str, Any]) -> None:
    """Checks our counters against RLlib's and the replay's; no stream is left without an env."""
    ours = result["dreamer"]
    assert ours["agent_steps"] == result["env_runners"]["num_env_steps_sampled_lifetime"]
    ends = int(algo.replay.get_state()["data"]["is_last"].sum())
    assert ours["agent_steps"] == algo.replay.stats()["inserts"] - ends
    assert algo.replay.stats()["streams"] == num_envs(algo.config)


def num_envs(config: DreamerConfig) -> int:
    return max(1, config.num_env_runners) * config.num_envs_per_env_runner


def train_while(algo: DreamerTorch, condition: Callable[[], bool]) -> dict[str, Any]:
    """Trains as long as the condition holds, and checks the training ratio exactly."""
    size = algo.config.batch_size_B * algo.config.batch_length_T
    reference = TrainingRatio(algo.config.training_ratio, size)
    reference.set_state(algo._ratio.get_state())
    expected = algo._updates
    while condition():
        result = algo.train()
        expected += reference.updates(result["dreamer"]["agent_steps"])
        assert result["dreamer"]["updates"] == expected
    return result


def test_a_killed_runner_is_replaced_and_tears_nothing() -> None:
    """Lost are the steps of one sample; the other runner goes on at once."""
    config = tiny_config(CountingEnv, length=60)
    config.env_runners(num_env_runners=2, num_envs_per_env_runner=2)
    with built(config) as algo:
        train_until(algo, 2)
        group = algo.env_runner_group
        pid = group.foreach_env_runner(lambda r: os.getpid(), local_env_runner=False)[0]
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        train_while(algo, lambda: group.num_healthy_remote_workers() == 2)
        before = algo._agent_steps
        train_while(algo, lambda: algo._agent_steps == before)
        assert algo._agent_steps - before == 2
        train_while(algo, lambda: group.num_healthy_remote_workers() < 2)
        print(f"\nrunner back after {time.monotonic() - start:.1f} s")
        steps = algo._agent_steps
        result = train_while(algo, lambda: algo._agent_steps < steps + 80)
        assert result["fault_tolerance"]["num_remote_worker_restarts"] == 1
        check_replay(algo)
        check_counters(algo, result)
        weights = group.foreach_env_runner(lambda r: r.module.get_state(), local_env_runner=False)
        assert_same(weights[0], weights[1])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", r"FaultyEnv.* failed in step\(\): .*OSError: camera lost.*restart_f"),
        ("nan observation", r"FaultyEnv.*agent step 30.*'vector'"),
        ("nan reward", r"FaultyEnv.*agent step 30.*reward"),
        ("shape", r"FaultyEnv.*agent step 30.*shape"),
    ],
)
def test_a_faulty_env_is_named_and_leaves_the_replay_whole(fault: str, message: str) -> None:
    with built(tiny_config(FaultyEnv, fault=fault, length=60)) as algo:
        with pytest.raises(RuntimeError, match=message):
            train_until(algo, 1000)
        assert algo._agent_steps in (29, 30)
        assert algo._agent_steps == algo.replay.stats()["inserts"] == len(algo.replay)
        check_replay(algo)


def test_an_env_that_raises_is_built_anew_where_that_is_asked_for() -> None:
    """Lost is the step that failed; the episodes of the runner end there."""
    config = tiny_config(FaultyEnv, fault="raise", length=60)
    config.env_runners(num_envs_per_env_runner=2)
    config.fault_tolerance(restart_failed_sub_environments=True)
    with built(config) as algo:
        train_until(algo, 2)
        result = train_while(algo, lambda: algo._agent_steps < 200)
        check_replay(algo)
        check_counters(algo, result)


@pytest.mark.parametrize("restart", [False, True])
def test_a_killed_sub_env_process(restart: bool) -> None:
    config = tiny_config(CountingEnv, length=60)
    config.env_runners(num_envs_per_env_runner=2, gym_env_vectorize_mode="async")
    config.fault_tolerance(restart_failed_sub_environments=restart)
    with built(config) as algo:
        train_until(algo, 2)
        steps = algo._agent_steps
        processes = algo.env_runner.env.unwrapped.processes
        os.kill(processes[1].pid, signal.SIGKILL)
        if restart:
            result = train_while(algo, lambda: algo._agent_steps < steps + 80)
            check_counters(algo, result)
        else:
            with pytest.raises(RuntimeError, match="a process of a sub-environment died"):
                algo.train()
            assert algo._agent_steps == steps
        check_replay(algo)
        assert not processes[0].is_alive() or not restart
