"""The algorithm as a whole: results, training ratio, evaluation, remote runners, Tune."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import tune
from tiny import (
    CONTINUOUS,
    IMAGE,
    CountingEnv,
    LengtheningEnv,
    RandomEnv,
    agent_of,
    assert_acting_with,
    assert_same,
    built,
    parameters_of,
    start_ray,
    tiny_config,
    train_until,
    watch_acting,
)

from rllib_dreamer import dreamer
from rllib_dreamer.dreamer import DreamerTorch
from rllib_dreamer.episode_averages import STATISTICS
from rllib_dreamer.replay import Replay
from rllib_dreamer.training_ratio import TrainingRatio

# Results.


def test_results_and_description() -> None:
    config = tiny_config(CountingEnv, training={"training_ratio": 16})
    with built(config) as algo:
        first = algo.train()
        assert math.isnan(first["env_runners"]["episode_return_mean"])  # none has ended
        result = train_until(algo, 5)
        text = algo.describe()
    ours = result["dreamer"]
    assert ours["env_steps"] == ours["agent_steps"] == result["num_env_steps_sampled_lifetime"]
    assert ours["actual_training_ratio"] == pytest.approx(5 * 32 / ours["agent_steps"])
    assert ours["replay_gb"] > 0
    episodes = result["env_runners"]
    low, mean, high = (episodes[f"episode_return_{end}"] for end in ("min", "mean", "max"))
    assert low <= mean <= high
    assert episodes["module_episode_return_mean"] == {"default_policy": mean}
    assert episodes["agent_episode_return_mean"] == {"default_agent": mean}
    assert [episodes[f"episode_len_{end}"] for end in ("min", "mean", "max")] == [6, 6, 6]
    losses = result["learners"]["default_policy"]
    for name in "vector dyn rep reward cont actor critic repval".split():
        assert f"loss_{name}" in losses
    for name in "kl actor_entropy return_scale value_mean grad_norm update_norm".split():
        assert np.isfinite(float(losses[name])), name
    for part in (
        "parameters",
        "cpu, float32, 1 threads",
        "1 local x 1 envs",
        "4 x 8",
        "2,000 steps",
    ):
        assert part in text


def test_the_description_points_out_an_idle_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with built(tiny_config()) as algo:
        hints = []
        for gpus in (0.0, 1.0):
            monkeypatch.setattr(ray, "cluster_resources", lambda gpus=gpus: {"CPU": 2, "GPU": gpus})
            hints.append("num_gpus_per_learner=1 uses a GPU" in algo.describe())
        assert hints == [False, True]
        algo._description["device"] = "cuda:0"
        assert "uses a GPU" not in algo.describe()


def test_statistics_of_episodes_keep_their_values_where_none_ends() -> None:
    """Episodes of 6 steps, one step an iteration."""
    with built(tiny_config(CountingEnv)) as algo:
        results = [algo.train()["env_runners"] for _ in range(14)]
    for name in STATISTICS:
        values = [result[name] for result in results]
        assert np.isnan(values[:5]).all() and np.isfinite(values[5:]).all(), name
        assert len(set(values[5:11])) == 1, name
    assert results[-1]["episode_success_mean"] == 1.0
    returns = {result["num_episodes_lifetime"]: result["episode_return_mean"] for result in results}
    assert results[-1]["episode_return_mean"] == returns[2] != returns[1]
    spread = results[-1]["episode_return_max"] - results[-1]["episode_return_min"]
    assert spread == pytest.approx(2 * abs(returns[2] - returns[1]))  # the mean is in the middle


@pytest.mark.parametrize("context", [True, False])
def test_replayed_sequences_start_from_their_context_or_from_zero(context: bool) -> None:
    config = tiny_config(CountingEnv, length=100, training={"replay_context": context})
    with built(config) as algo:
        train_until(algo, 1)
        resets, shards = [], algo._shards
        algo._shards = lambda batch: resets.append(batch["is_first"][:, 1]) or shards(batch)
        algo._update()
        written = []
        algo.replay.update_latents = lambda *latents: written.append(latents)
        algo._update()
    assert np.all(resets) == (not context)
    assert len(written) == context  # nothing reads them without a context


# Training ratio.


def count_updates(algo: DreamerTorch, iterations: int) -> None:
    """Trains, and holds the updates of each iteration against exact arithmetic."""
    config = algo.config
    reference = TrainingRatio(config.training_ratio, config.batch_size_B * config.batch_length_T)
    expected = 0
    for _ in range(iterations):
        dreamer = algo.train()["dreamer"]
        if dreamer["updates"]:
            expected += reference.updates(dreamer["agent_steps"])
        assert dreamer["updates"] == expected


@pytest.mark.parametrize(("ratio", "envs", "iterations"), [(20, 4, 25), (100, 1, 50)])
def test_the_training_ratio_is_exact(ratio: float, envs: int, iterations: int) -> None:
    """Below and above B * T = 32 steps of a batch; one training step an iteration."""
    config = tiny_config(training={"training_ratio": ratio})
    with built(config.env_runners(num_envs_per_env_runner=envs)) as algo:
        count_updates(algo, iterations)
        assert algo._updates >= 3


def test_the_actual_ratio_is_of_the_steps_that_were_replayed(tmp_path: Path) -> None:
    """Batches of 4 x 8 steps, then of 8 x 8."""
    with built(tiny_config()) as algo:
        train_until(algo, 2)
        replayed, path = 32 * algo._updates, algo.save_to_path(tmp_path / "c")
    with built(tiny_config(training={"batch_size_B": 8})) as algo:
        algo.restore_from_path(path)
        assert algo._updates
        before = algo._updates
        result = train_until(algo, before + 2)["dreamer"]
        replayed += 64 * (result["updates"] - before)
        assert result["actual_training_ratio"] == pytest.approx(replayed / result["agent_steps"])


# Weights, and a small replay.


def test_weights_are_handed_out_though_updates_and_broadcasts_never_coincide() -> None:
    """One update in four steps, a broadcast in four steps, not the same ones."""
    training = {"training_ratio": 8, "broadcast_interval": 4}
    with built(tiny_config(RandomEnv, training=training)) as algo:
        while not algo._updates:
            algo._training_steps = 0  # the first update comes in no fourth step
            algo.train()
        for _ in range(3):
            algo.train()
        assert_acting_with(algo.env_runner_group, parameters_of(algo))


def test_a_replay_smaller_than_what_training_waits_for_is_learned_from_once_full() -> None:
    """Four streams of 15 steps have 4 x 7 sequences, fewer than the 32 steps of a batch."""
    config = tiny_config(RandomEnv, training={"replay_capacity": 60})
    with built(config.env_runners(num_envs_per_env_runner=4)) as algo:
        result = train_until(algo, 3)
        assert algo.replay.num_sequences < 32
        assert result["dreamer"]["agent_steps"] >= 50


def test_a_replay_too_small_for_its_streams_is_named() -> None:
    config = tiny_config(RandomEnv, training={"replay_capacity": 64})
    with (
        built(config.env_runners(num_envs_per_env_runner=8)) as algo,
        pytest.raises(ValueError, match=r"64 steps in 8 streams.*raise replay_capacity"),
    ):
        train_until(algo, 1)


# Repeatability.


def test_the_same_seed_gives_the_same_parameters() -> None:
    runs = []
    for _ in range(2):
        with built(tiny_config(observation_space=IMAGE, action_space=CONTINUOUS)) as algo:
            train_until(algo, 20)
            runs.append((parameters_of(algo), algo.replay.get_state()["data"]))
    assert_same(runs[0], runs[1])
    with built(
        tiny_config(observation_space=IMAGE, action_space=CONTINUOUS).debugging(seed=1)
    ) as algo:
        other = parameters_of(algo)
        assert (other["world.cont.out.weight"] != runs[0][0]["world.cont.out.weight"]).any()


# Evaluation.


@pytest.mark.parametrize("explore", [None, False, True])
def test_evaluation_acts_greedily_unless_it_is_told_to_explore(explore: bool | None) -> None:
    own = {"env_config": {"length": 7}} | ({} if explore is None else {"explore": explore})
    config = tiny_config(CountingEnv).evaluation(
        evaluation_interval=2, evaluation_duration=3, evaluation_config=own
    )
    with built(config) as algo:
        algo.train()
        steps = algo._agent_steps
        training = watch_acting(algo.env_runner.module.agent)
        evaluation = watch_acting(algo.eval_env_runner.module.agent)
        result = algo.train()["evaluation"]["env_runners"]
        assert result["num_episodes"] == 3
        assert result["episode_len_mean"] == 7
        assert algo._agent_steps == steps + 1  # evaluation is no training
    assert len(evaluation) >= 3 * 7
    assert set(evaluation) == {"sampled" if explore else "greedy"}
    assert training == ["sampled"]


def test_evaluation_is_over_all_its_episodes_one_after_the_other() -> None:
    """Not over the latest few, nor over those that end first of several envs."""
    config = tiny_config(LengtheningEnv, training={"initial_random_steps": 10**6})
    config.env_runners(num_envs_per_env_runner=4)
    config.reporting(metrics_num_episodes_for_smoothing=2)
    config.evaluation(evaluation_interval=1, evaluation_duration=5)
    with built(config) as algo:
        result = algo.train()["evaluation"]["env_runners"]
        assert result["num_episodes"] == 5
        assert result["episode_len_mean"] == 3
        assert algo.eval_env_runner.num_envs == 1
    config.evaluation(evaluation_config={"num_envs_per_env_runner": 2, "explore": True})
    with built(config) as algo:
        kinds = watch_acting(algo.eval_env_runner.module.agent)
        assert algo.train()["evaluation"]["env_runners"]["episode_len_max"] == 3
        assert algo.eval_env_runner.num_envs == 2
        assert set(kinds) == {"sampled"}  # the random steps are training's


def test_evaluation_needs_env_runners_of_its_own() -> None:
    with (
        built(tiny_config(CountingEnv)) as algo,
        pytest.raises(ValueError, match=r"set config.evaluation\(evaluation_interval=...\)"),
    ):
        algo.evaluate()


def test_evaluation_beside_training() -> None:
    config = tiny_config(CountingEnv).evaluation(
        evaluation_interval=1,
        evaluation_num_env_runners=1,
        evaluation_parallel_to_training=True,
        evaluation_duration=2,
    )
    with built(config) as algo:
        train_until(algo, 2)
        result = algo.train()["evaluation"]["env_runners"]
        assert result["episode_len_mean"] == 6
        state = algo.eval_env_runner_group.foreach_env_runner(
            lambda r: r.module.get_state(), local_env_runner=False
        )[0]
        assert any(key.startswith("agent.world.encoder") for key in state)


# Remote runners and Tune.


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)


def test_remote_env_runners_hold_the_ratio_and_get_the_weights(tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    config = tiny_config(training={"training_ratio": 24})
    config.env_runners(num_env_runners=2, num_envs_per_env_runner=2)
    with built(config) as algo:
        count_updates(algo, 25)
        assert algo._updates >= 10
        assert "2 remote x 2 envs" in algo.describe()
        states = algo.env_runner_group.foreach_env_runner(
            lambda r: r.module.get_state(), local_env_runner=False
        )
        mine = {f"agent.{key}": x for key, x in agent_of(algo).state_dict().items()}
        for state in states:
            assert_same(state, {key: mine[key] for key in state})
        group = algo.env_runner_group
        group.fetch_ready_async_reqs(tags="set_state", timeout_seconds=60)
        group.foreach_env_runner_async(lambda runner: wait_for(go_on), tag="set_state")
        assert not algo._hand_out_weights()  # they have not taken their last ones
        go_on.touch()
        group.fetch_ready_async_reqs(tags="set_state", timeout_seconds=60)
        assert algo._hand_out_weights()


def fit(trainable: Any, space: Any, tmp_path: Path) -> list[Any]:
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        run_config=tune.RunConfig(
            stop={"dreamer/updates": 2}, storage_path=str(tmp_path), verbose=0
        ),
    )
    results = tuner.fit()
    assert not results.errors, results.errors
    return list(results)


def test_tune_by_name_with_a_config_and_remote_runners(tmp_path: Path) -> None:
    start_ray()
    config = tiny_config(observation_space=IMAGE, action_space=CONTINUOUS)
    results = fit("DreamerTorch", config.env_runners(num_env_runners=2), tmp_path)
    assert results[0].metrics["dreamer"]["updates"] >= 2


def test_tune_by_name_with_a_dict_and_a_grid_after_a_restart_of_ray(tmp_path: Path) -> None:
    ray.shutdown()
    start_ray()
    space = tiny_config(CountingEnv).to_dict()
    space["training_ratio"] = tune.grid_search([16, 64])
    results = fit("DreamerTorch", space, tmp_path)
    assert sorted(r.config["training_ratio"] for r in results) == [16, 64]


# Memory.


def test_memory_is_given_back_before_a_replay_is_reserved_and_once_it_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Watched(Replay):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            events.append("reserved")
            super().__init__(*args, **kwargs)

        def close(self) -> None:
            super().close()
            events.append("closed")

    monkeypatch.setattr(dreamer, "Replay", Watched)
    monkeypatch.setattr(dreamer, "release_memory", lambda: events.append("released"))
    with built(tiny_config()):
        pass
    assert events == ["released", "reserved", "closed", "released"]
