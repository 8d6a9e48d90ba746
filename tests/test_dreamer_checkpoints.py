"""Saving and restoring. What a resumed run repeats exactly is said where it is tested."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
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
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from tiny import (
    CountingEnv,
    assert_acting_with,
    assert_same,
    built,
    learner_of,
    parameters_of,
    start_ray,
    tiny_config,
    train_until,
    watch_acting,
)

from rllib_dreamer import checkpoint
from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.part_rates import PARTS

HERE = Path(__file__).resolve().parent
MODULE = "learner_group/learner/rl_module"


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


@pytest.mark.parametrize(("first", "second"), [("laprop", "adam"), ("adam", "laprop")])
def test_the_state_of_another_optimizer_is_refused(first: str, second: str, tmp_path: Path) -> None:
    def config(optimizer: str) -> DreamerConfig:
        return tiny_config(CountingEnv, training={"optimizer": optimizer}, length=30)

    with built(config(first)) as algo:
        train_until(algo, 2)
        path = algo.save_to_path(tmp_path / "saved")
    message = f"optimizer='{second}' cannot go on from the state of '{first}'.*='{first}'"
    with built(config(second)) as algo, pytest.raises(ValueError, match=message):
        algo.restore_from_path(path)


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


def test_building_from_a_checkpoint_in_a_fresh_process(saved: Any) -> None:
    paths = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}\n"
    command = [sys.executable, "-W", "ignore", "-c", paths + FRESH, str(saved[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    name, before, after = json.loads(done.stdout.split("RESULT")[1])
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


def remove_it(replay: Path) -> None:
    shutil.rmtree(replay)


def remove_a_part(replay: Path) -> None:
    (replay / "column_00.npy").unlink()


@pytest.mark.parametrize("harm", [remove_it, remove_a_part])
def test_a_replay_that_was_removed_is_missed_only_where_it_is_loaded(
    saved: Any, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = shutil.copytree(saved[0], tmp_path / "copy")
    harm(path / "replay")
    config = tiny_config(CountingEnv, length=30)
    with (
        built(config) as algo,
        pytest.raises(ValueError, match=r"replay/column_00\.npy is missing"),
    ):
        algo.restore_from_path(path)
    without = config.copy(copy_frozen=False).training(store_buffer_in_checkpoints=False)
    algo = DreamerTorch.from_checkpoint(path, config=without)
    try:
        assert_same(parameters_of(algo), saved[1]["parameters"])
        assert len(algo.replay) == 0
    finally:
        algo.stop()


def test_what_lay_in_the_folder_is_kept_and_may_change(tmp_path: Path) -> None:
    """Also what is named like a checkpoint's replay, and is not loaded as one."""
    path = tmp_path / "c"
    names = ("run.log", "replay/note.txt", "replay/replay.json")
    (path / "replay").mkdir(parents=True)
    for name in names:
        (path / name).write_text("mine")
    config = tiny_config(training={"store_buffer_in_checkpoints": False})
    with built(config.copy(copy_frozen=False)) as algo:
        for text in ("changed", "changed again"):
            algo.save_to_path(path)
            for name in names:
                assert (path / name).is_file()
                (path / name).write_text(text)
    with built(config.training(store_buffer_in_checkpoints=True)) as algo:
        algo.restore_from_path(path)
        assert len(algo.replay) == 0


class RealEnv(CountingEnv):
    """What `CountingEnv` simulates."""


@pytest.mark.parametrize("with_replay", [True, False])
def test_an_agent_goes_on_in_another_env(saved: Any, with_replay: bool) -> None:
    path, state, _ = saved
    config = tiny_config(RealEnv, length=30)
    config.training(store_buffer_in_checkpoints=with_replay)
    algo = DreamerTorch.from_checkpoint(path, config=config)
    try:
        assert_same(parameters_of(algo), state["parameters"])
        assert type(algo.env_runner.env.unwrapped.envs[0].unwrapped) is RealEnv
        assert (len(algo.replay) > 0) == with_replay
        before = algo._updates
        train_until(algo, before + 1)
    finally:
        algo.stop()


def test_going_back_gives_the_runner_the_old_weights_at_once(tmp_path: Path) -> None:
    with built(tiny_config(CountingEnv)) as algo:
        train_until(algo, 1)
        path = algo.save_to_path(tmp_path / "c")
        train_until(algo, 3)
        algo.restore_from_path(path)
        assert_acting_with(algo.env_runner_group, parameters_of(algo))


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


def test_a_checkpoint_of_an_actor_keeps_a_class_of_no_module(tmp_path: Path) -> None:
    class Own(DreamerTorch):
        pass

    start_ray()
    actor = ray.remote(Own).remote(tiny_config().environment(CountingEnv))
    folder = ray.get(actor.save_to_path.remote(str(tmp_path / "c")))
    ray.kill(actor)
    algo = Own.from_checkpoint(folder)
    assert type(algo) is Own
    algo.stop()


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with built(tiny_config()) as algo:
        assert algo.save_to_path("c") == str(tmp_path / "c")
        algo.restore_from_path("c")


def test_saving_elsewhere_is_refused() -> None:
    with built(tiny_config()) as algo, pytest.raises(ValueError, match="folder of this machine"):
        algo.save_to_path("s3://bucket/c")


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
        assert Fraction(algo._ratio.get_state()["owed"]) == Fraction(1) / Fraction("1.6")  # 1 step
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
