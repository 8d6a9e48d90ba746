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

import fsspec
import numpy as np
import pytest
import ray
import torch
from pyarrow.fs import FileSystem
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

from rllib_dreamer import checkpoint, dreamer
from rllib_dreamer.dreamer import DreamerTorch
from rllib_dreamer.dreamer_config import PARTS
from rllib_dreamer.episode_averages import STATISTICS
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.replay import Replay
from rllib_dreamer.training_ratio import TrainingRatio

HERE = Path(__file__).resolve().parent
MODULE = "learner_group/learner/rl_module"


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


@pytest.mark.parametrize(
    ("ratio", "envs", "iterations"), [(3, 1, 100), (20, 4, 25), (100, 1, 50), (64, 3, 24)]
)
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
        state = algo.get_state(components="nothing")
        del state["dreamer"]["replayed_steps"]  # as of an earlier version
        algo.set_state(state)
        assert algo._replayed_steps == 64 * result["updates"]


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
        algo._skipped_in_a_row = 9  # one more would stop the run
        algo.restore_from_path(str(saved[0]))
        assert algo._skipped_in_a_row == 0
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
    with built(tiny_config(CountingEnv, length=30)) as algo:
        algo.restore_from_path(str(saved[0] / MODULE), component=MODULE)
        assert_same(parameters_of(algo), saved[1]["parameters"])
        assert algo._updates == 0


@pytest.fixture
def bucket(saved: Any) -> Iterator[str]:
    """The URI of the checkpoint in a filesystem that is not of this machine's disks."""
    memory = fsspec.filesystem("memory")
    memory.put(str(saved[0]), "/bucket/run/checkpoint", recursive=True)
    yield "fsspec+memory://bucket/run/checkpoint"
    memory.rm("/bucket", recursive=True)


def test_restoring_from_another_filesystem(saved: Any, bucket: str) -> None:
    elsewhere, path = FileSystem.from_uri(bucket)
    config = tiny_config(CountingEnv, training={"training_ratio": 12}, length=30)
    with built(config) as algo:
        for given in ({"path": bucket}, {"path": path, "filesystem": elsewhere}):
            algo.restore_from_path(**given)
            check_restored(algo, saved)
            train_until(algo, 6)
        algo.restore_from_path(f"{bucket}/{MODULE}", component=MODULE)
        assert_same(parameters_of(algo), saved[1]["parameters"])
        assert_acting_with(algo.env_runner_group, saved[1]["parameters"])
        elsewhere.delete_file(f"{path}/algorithm_state.pkl")
        with pytest.raises(ValueError, match=r"algorithm_state\.pkl is missing"):
            algo.restore_from_path(bucket)


def test_building_from_another_filesystem(saved: Any, bucket: str) -> None:
    start_ray()
    algo = DreamerTorch.from_checkpoint(bucket)
    try:
        check_restored(algo, saved)
    finally:
        algo.stop()


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


@pytest.mark.parametrize("component", [None, MODULE])
def test_going_back_evaluates_the_old_weights(tmp_path: Path, component: str | None) -> None:
    config = tiny_config(CountingEnv).evaluation(evaluation_interval=1000, evaluation_duration=1)
    with built(config) as algo:
        train_until(algo, 1)
        path, old = Path(algo.save_to_path(tmp_path / "c")), parameters_of(algo)
        train_until(algo, 3)
        algo.evaluate()
        algo.restore_from_path(path / (component or ""), component=component)
        assert_acting_with(algo.env_runner_group, old)
        algo.evaluate()
        assert_acting_with(algo.eval_env_runner_group, old)


def test_a_local_runner_draws_no_random_actions_again_after_remote_ones(tmp_path: Path) -> None:
    config = tiny_config(training={"initial_random_steps": 20})
    remote = config.copy(copy_frozen=False)
    with built(remote.env_runners(num_env_runners=1, create_local_env_runner=False)) as algo:
        while algo._agent_steps < 25:
            algo.train()
        path = algo.save_to_path(tmp_path / "c")
    with built(config) as algo:
        kinds = watch_acting(algo.env_runner.module.agent)
        algo.train()
        algo.restore_from_path(path)
        algo.train()
        assert kinds == ["random", "sampled"]


def watch_acting(agent: Agent) -> list[str]:
    """A list that gets what each action from now on is: "random", "greedy" or "sampled"."""
    kinds: list[str] = []
    dists: list[dict[str, Any]] = []
    agent.behavior.actor.register_forward_hook(lambda module, args, out: dists.append(out))
    act = agent.act

    def watched(obs: Any, state: Any, explore: bool, random: bool = False) -> Any:
        actions, state = act(obs, state, explore, random)
        greedy = all(torch.equal(actions[name], d.mode()) for name, d in dists[-1].items())
        kinds.append("random" if random else "greedy" if greedy else "sampled")
        return actions, state

    agent.act = watched  # type: ignore[method-assign]
    return kinds


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
