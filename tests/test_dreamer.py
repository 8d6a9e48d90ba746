"""The algorithm as a whole. What a resumed run repeats exactly is said where it is tested."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from tiny import (
    CONTINUOUS,
    IMAGE,
    CountingEnv,
    RandomEnv,
    agent_of,
    assert_same,
    built,
    learner_of,
    parameters_of,
    start_ray,
    tiny_config,
    train_until,
)

import rllib_dreamer
from rllib_dreamer import checkpoint
from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch
from rllib_dreamer.dreamer_config import PARTS
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.training_ratio import TrainingRatio

HERE = Path(__file__).resolve().parent


# Results.


def test_results_and_description() -> None:
    config = tiny_config(CountingEnv, training={"training_ratio": 16})
    with built(config) as algo:
        first = algo.train()
        assert "episode_return_mean" not in first["env_runners"]  # none has ended: no NaN either
        result = train_until(algo, 5)
        text = algo.describe()
    ours = result["dreamer"]
    assert ours["env_steps"] == ours["agent_steps"] == result["num_env_steps_sampled_lifetime"]
    assert ours["actual_training_ratio"] == pytest.approx(5 * 32 / ours["agent_steps"])
    assert ours["replay_gb"] > 0
    assert np.isfinite(result["env_runners"]["episode_return_mean"])
    assert result["env_runners"]["episode_len_mean"] == 6
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


def test_returns_are_averaged_over_the_latest_episodes() -> None:
    with built(tiny_config().reporting(metrics_num_episodes_for_smoothing=3)) as algo:
        means = []
        for ended, mean in ((2, 10.0), (0, math.nan), (1, 40.0), (1, 50.0), (3, 60.0)):
            results = {"num_episodes": ended, "episode_return_mean": mean, "episode_len_mean": mean}
            algo._average_episodes(results)
            means.append(results["episode_return_mean"])
        assert means == [10.0, 10.0, 20.0, 27.5, 60.0]


@pytest.mark.parametrize("context", [True, False])
def test_replayed_sequences_start_from_their_context_or_from_zero(context: bool) -> None:
    config = tiny_config(CountingEnv, length=100, training={"replay_context": context})
    with built(config) as algo:
        train_until(algo, 1)
        resets, shards = [], algo._shards
        algo._shards = lambda batch: resets.append(batch["is_first"][:, 1]) or shards(batch)
        algo._update()
    assert np.all(resets) == (not context)


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


@pytest.mark.parametrize(
    ("ratio", "envs", "iterations"), [(3, 1, 100), (20, 4, 25), (100, 1, 50), (64, 3, 24)]
)
def test_the_training_ratio_is_exact(ratio: float, envs: int, iterations: int) -> None:
    """Below and above B * T = 32 steps of a batch; one training step an iteration."""
    config = tiny_config(training={"training_ratio": ratio})
    with built(config.env_runners(num_envs_per_env_runner=envs)) as algo:
        count_updates(algo, iterations)
        assert algo._updates >= 3


# Checkpoints.


def snapshot(algo: DreamerTorch) -> dict[str, Any]:
    """Everything that a checkpoint must bring back."""
    learner = learner_of(algo)
    optimizers = {
        name: learner.get_optimizer(DEFAULT_MODULE_ID, name).state_dict() for name in PARTS
    }
    steps = {name: state["param_groups"][0]["step"] for name, state in optimizers.items()}
    moments = {name: copy.deepcopy(state["state"]) for name, state in optimizers.items()}
    counters = algo.get_state(components="nothing")["dreamer"]
    rng = torch.get_rng_state()
    return {
        "parameters": parameters_of(algo),
        "steps": steps,
        "moments": moments,
        "counters": counters,
        "rng": rng,
        "replay": algo.replay.get_state(),
        "lifetime": algo.metrics.peek(("env_runners", "num_env_steps_sampled_lifetime")),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint, what it holds, and the batches that come next."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    with built(tiny_config(CountingEnv, training={"training_ratio": 12}, length=30)) as algo:
        train_until(algo, 4)
        algo.save_to_path(path)
        state = snapshot(algo)
        batches = [algo.replay.sample() for _ in range(3)]
    return path, state, batches


def check_restored(algo: DreamerTorch, saved: Any) -> None:
    _, state, batches = saved
    assert_same(snapshot(algo), state)
    assert_same([algo.replay.sample() for _ in range(3)], batches)


def test_restoring_into_an_algorithm(saved: Any) -> None:
    config = tiny_config(CountingEnv, training={"training_ratio": 12}, length=30).debugging(seed=9)
    with built(config) as algo:
        train_until(algo, 2)
        algo.restore_from_path(str(saved[0]))
        check_restored(algo, saved)
        assert_same(
            dict(algo.env_runner.module.agent.state_dict()),
            {k: saved[1]["parameters"][k] for k in algo.env_runner.module.agent.state_dict()},
        )


def test_building_from_a_checkpoint(saved: Any) -> None:
    start_ray()
    algo = Algorithm.from_checkpoint(str(saved[0]))
    try:
        assert isinstance(algo, DreamerTorch)
        check_restored(algo, saved)
        before = algo._updates, algo._agent_steps
        while algo._updates == before[0]:
            algo.train()
        assert algo._updates == before[0] + 1  # neither a burst nor a gap: 32 / 12 steps later
        assert algo._agent_steps - before[1] <= 3
    finally:
        algo.stop()


def test_restoring_one_component(saved: Any) -> None:
    """RLlib's way to take over only the weights; the part has no manifest of its own."""
    part = "learner_group/learner/rl_module"
    with built(tiny_config(CountingEnv, length=30)) as algo:
        algo.restore_from_path(str(saved[0] / part), component=part)
        assert_same(parameters_of(algo), saved[1]["parameters"])
        assert algo._updates == 0


FRESH = """
import json, sys, ray
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
from ray.rllib.algorithms.algorithm import Algorithm
assert "rllib_dreamer" not in sys.modules
algo = Algorithm.from_checkpoint(sys.argv[1])
before = algo._updates, algo._agent_steps, len(algo.replay)
result = algo.train()
after = result["dreamer"]["updates"], result["dreamer"]["agent_steps"]
print("RESULT", json.dumps([type(algo).__name__, before, after]))
"""


def run_fresh(code: str, *args: Any) -> subprocess.Popen:
    paths = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}\n"
    command = [sys.executable, "-W", "ignore", "-c", paths + code, *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent
    )


def test_building_from_a_checkpoint_in_a_fresh_process(saved: Any) -> None:
    process = run_fresh(FRESH, saved[0])
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err[-2000:]
    name, before, after = json.loads(out.split("RESULT")[1])
    counters = saved[1]["counters"]
    assert name == "DreamerTorch"
    assert before == [
        counters["updates"],
        counters["agent_steps"],
        len(saved[1]["replay"]["data"]["reward"]),
    ]
    assert after[1] == before[1] + 1
    assert after[0] - before[0] in (0, 1)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / checkpoint.MANIFEST).unlink(), "saving was not finished"),
        (lambda p: (p / "replay" / "link.npy").symlink_to("/"), "replay/link.npy leads out of it"),
        (lambda p: (p / "algorithm_state.pkl").unlink(), r"algorithm_state\.pkl is missing"),
        (lambda p: (p / "replay" / "replay.json").write_text("{}"), r"replay\.json has 2 bytes"),
    ],
)
def test_a_harmed_checkpoint_is_refused(
    saved: Any, tmp_path: Path, harm: Callable[[Path], Any], message: str
) -> None:
    path = shutil.copytree(saved[0], tmp_path / "copy")
    harm(path)
    with built(tiny_config(CountingEnv, length=30)) as algo:
        before = parameters_of(algo)
        with pytest.raises(ValueError, match=message):
            algo.restore_from_path(str(path))
        assert_same(parameters_of(algo), before)


def test_a_checkpoint_without_the_replay(tmp_path: Path) -> None:
    config = tiny_config(training={"store_buffer_in_checkpoints": False})
    with built(config) as algo:
        train_until(algo, 2)
        updates, steps = algo._updates, algo._agent_steps
        path = Path(algo.save_to_path(tmp_path / "c"))
        assert not (path / "replay").exists()
    with built(config.copy(copy_frozen=False)) as algo:
        algo.restore_from_path(str(path))
        assert (algo._updates, algo._agent_steps, len(algo.replay)) == (updates, steps, 0)
        result = train_until(algo, updates + 1)
        assert result["dreamer"]["updates"] == updates + 1  # no burst for the steps of the refill


def test_going_back_gives_the_runner_the_old_weights_at_once(tmp_path: Path) -> None:
    with built(tiny_config(CountingEnv)) as algo:
        train_until(algo, 1)
        path = algo.save_to_path(tmp_path / "c")
        train_until(algo, 3)
        algo.restore_from_path(path)
        assert_acting_with(algo.env_runner_group, parameters_of(algo))


def assert_acting_with(group: Any, parameters: dict[str, np.ndarray]) -> None:
    """Checks the weights of every EnvRunner."""
    runners = group.foreach_env_runner(lambda runner: runner.module.get_state())
    assert runners
    for held in runners:
        assert_same(held, {name: parameters[name.removeprefix("agent.")] for name in held})


def test_going_back_evaluates_the_old_weights(tmp_path: Path) -> None:
    config = tiny_config(CountingEnv).evaluation(evaluation_interval=1000, evaluation_duration=1)
    with built(config) as algo:
        train_until(algo, 1)
        path = algo.save_to_path(tmp_path / "c")
        train_until(algo, 3)
        algo.evaluate()
        algo.restore_from_path(path)
        algo.evaluate()
        assert_acting_with(algo.eval_env_runner_group, parameters_of(algo))


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


def test_saving_over_a_checkpoint(tmp_path: Path) -> None:
    with built(tiny_config()) as algo:
        train_until(algo, 2)
        algo.save_to_path(tmp_path / "c")
        train_until(algo, 4)
        algo.save_to_path(tmp_path / "c")
        checkpoint.verify(tmp_path / "c")
        assert [p.name for p in tmp_path.iterdir()] == ["c"]
        state = snapshot(algo)
        train_until(algo, 5)
        algo.restore_from_path(str(tmp_path / "c"))
        assert_same(snapshot(algo), state)


def test_a_checkpoint_of_an_actor_names_the_class(tmp_path: Path) -> None:
    start_ray()
    actor = ray.remote(DreamerTorch).remote(tiny_config().environment(CountingEnv))
    folder = Path(ray.get(actor.save_to_path.remote(str(tmp_path / "c"))))
    ray.kill(actor)
    construction = pickle.loads((folder / "class_and_ctor_args.pkl").read_bytes())
    assert construction["class"] is DreamerTorch


def test_saving_elsewhere_is_refused() -> None:
    with built(tiny_config()) as algo, pytest.raises(ValueError, match="folder of this machine"):
        algo.save_to_path("s3://bucket/c")


KILLED = """
import os, sys, time
from tiny import CountingEnv, tiny_config, train_until
import rllib_dreamer.replay
algo = tiny_config(CountingEnv, length=30).build_algo()
train_until(algo, 2)
algo.save_to_path(sys.argv[1])
print("SAVED", flush=True)
save = rllib_dreamer.replay.Replay.save
def slow(self, path):
    save(self, path)
    print("SAVING", flush=True)
    time.sleep(600)
rllib_dreamer.replay.Replay.save = slow
train_until(algo, 4)
algo.save_to_path(sys.argv[2])
"""


@pytest.mark.parametrize("same", [True, False], ids=["over-the-previous", "beside-the-previous"])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path: Path, same: bool) -> None:
    first = tmp_path / "first"
    second = first if same else tmp_path / "second"
    process = run_fresh(KILLED, first, second)
    assert process.stdout is not None
    lines: Iterator[str] = iter(process.stdout.readline, "")
    assert any(line.startswith("SAVING") for line in lines), process.communicate()[1][-2000:]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    checkpoint.verify(first)
    assert same or not checkpoint.is_complete(second)
    with built(tiny_config(CountingEnv, length=30)) as algo:
        algo.restore_from_path(str(first))
        assert algo._updates == 2


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


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    """Checkpoints hold neither the state of an environment nor the noise of those who act.

    So the run is broken where an episode has just ended, the environment does nothing at random,
    and acting takes no noise. All else, the learner's noise and the draws of the replay included,
    must go on as if nothing had happened: 12 more steps, with their updates, give the same bits.
    """
    config = tiny_config(CountingEnv, length=10, training={"training_ratio": 20})

    def without_noise(algo: DreamerTorch) -> DreamerTorch:
        algo.env_runner.module.agent.noise = FixedNoise()
        return algo

    def until(algo: DreamerTorch, steps: int) -> None:
        while algo._agent_steps < steps:
            algo.train()

    with built(config.copy(copy_frozen=False)) as algo:
        until(without_noise(algo), 70)
        assert algo._updates > 5
        assert Fraction(algo._ratio.get_state()["accounted"]) == 69  # 1 step of 1.6 carried
        path = algo.save_to_path(tmp_path / "c")
        until(algo, 82)
        unbroken = snapshot(algo)
    with built(config.copy(copy_frozen=False).debugging(seed=77)) as algo:
        without_noise(algo).restore_from_path(path)
        assert algo._agent_steps == 70
        until(algo, 82)
        resumed = snapshot(algo)
    for key in ("parameters", "steps", "moments", "counters", "rng"):
        assert_same(resumed[key], unbroken[key], key)
    for key, column in unbroken["replay"]["data"].items():
        np.testing.assert_array_equal(resumed["replay"]["data"][key], column, err_msg=key)


# Evaluation.


def test_evaluation_acts_without_exploring() -> None:
    config = tiny_config(CountingEnv).evaluation(
        evaluation_interval=2, evaluation_duration=3, evaluation_config={"explore": False}
    )
    with built(config) as algo:
        algo.train()
        steps = algo._agent_steps
        result = algo.train()["evaluation"]["env_runners"]
        assert result["num_episodes"] == 3
        assert result["episode_len_mean"] == 6
        assert algo._agent_steps == steps + 1  # evaluation is no training


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


def test_remote_env_runners_hold_the_ratio_and_get_the_weights() -> None:
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


def test_registering_again_is_harmless() -> None:
    rllib_dreamer.register()
    rllib_dreamer.register()
    assert issubclass(rllib_dreamer.DreamerTorch, Algorithm)
    assert rllib_dreamer.DreamerConfig is DreamerConfig
