"""Envs that misbehave, under RLlib's ways to run several: named, replaced, never half in replay."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import tiny
from gymnasium import spaces
from pyarrow import parquet
from ray import tune
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

from rllib_dreamer.dreamer_env_runner import DreamerEnvRunner, RecordingEnvRunner
from rllib_dreamer.envs import checked_creator, register_env, wrappers
from rllib_dreamer.envs.deadline import Deadline

LENGTH = 8
BAD_STEP = 5


class Misbehaving(gym.Env):
    """Observes the number of its steps; does something wrong at step 5 of its first episode.

    Keys of the config: `fault`: one of `FAULTS`, and `flag`: a path; the fault happens once and
    leaves a file there.
    """

    observation_space = spaces.Box(-1.0, 100.0, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, config: Any) -> None:
        self.fault, self.flag = config["fault"], config["flag"]
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: int) -> Any:
        self.steps += 1
        bad = self.steps == BAD_STEP and not self.flag.exists()
        obs, reward = np.full(3, self.steps, np.float32), 1.0
        if bad:
            self.flag.touch()
            obs, reward = self.misbehave(obs)
        return obs, reward, False, self.steps == LENGTH, {}

    def misbehave(self, obs: np.ndarray) -> tuple[np.ndarray, float]:
        if self.fault == "raise":
            raise ZeroDivisionError("gripper")
        if self.fault == "hang":
            threading.Event().wait()
        if self.fault == "nan":
            obs[1] = np.nan
        if self.fault == "shape":
            obs = obs[:2]
        return obs, (np.inf if self.fault == "reward" else 1.0)


FAULTS = {
    "raise": r"raised in step\(\) at agent step 5 of its episode: ZeroDivisionError: gripper",
    "hang": r"hangs in step\(\) at agent step 5 of its episode: no answer within 3 s",
    "nan": "agent step 5 of its episode, key 'vector': 1 of 3 numbers are NaN",
    "shape": r"agent step 5 of its episode, key 'vector': shape \(2,\), but its space says \(3,\)",
    "reward": "agent step 5 of its episode, key 'reward': the reward is inf",
}


def config_of(tmp_path: Any, fault: str, *, mode: str = "sync", restart: bool = False) -> Any:
    config = tiny.tiny_config(Misbehaving, fault=fault, flag=tmp_path / "flag")
    config.env_runners(
        num_envs_per_env_runner=2,
        gym_env_vectorize_mode=mode,
        rollout_fragment_length=4,
        sample_timeout_s=3 if fault == "hang" else 60,
    )
    return config.fault_tolerance(restart_failed_sub_environments=restart)


@pytest.fixture
def runner_of() -> Iterator[Any]:
    """Builds env runners and stops them."""
    runners: list[DreamerEnvRunner] = []

    def build(config: Any) -> DreamerEnvRunner:
        tiny.start_ray()
        runners.append(DreamerEnvRunner(config=config, worker_index=0))
        return runners[-1]

    yield build
    for runner in runners:
        runner.stop()


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_the_runner_starts_anew_when_asked_again(
    tmp_path: Any, runner_of: Any, fault: str, mode: str
) -> None:
    runner = runner_of(config_of(tmp_path, fault, mode=mode))
    (first, second) = runner.sample()
    assert len(first) == len(second) == 4
    with pytest.raises(RuntimeError) as error:
        runner.sample()
    with pytest.raises(Exception, match=f"Env 'Misbehaving'.*{FAULTS[fault]}"):
        raise error.value.__cause__  # type: ignore[misc]
    again = runner.sample()
    assert {episode.id_ for episode in again}.isdisjoint({first.id_, second.id_})
    assert all(episode.t_started == 0 and len(episode) == 4 for episode in again)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_env_is_replaced_and_its_step_discarded(
    tmp_path: Any,
    runner_of: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    mode: str,
) -> None:
    monkeypatch.setattr(logging.getLogger("ray"), "propagate", True)
    runner = runner_of(config_of(tmp_path, fault, mode=mode, restart=True))
    before = runner.sample()
    after = runner.sample()
    with pytest.raises(AssertionError, match=f"Env 'Misbehaving'.*{FAULTS[fault]}"):
        raise AssertionError(caplog.text)
    assert {e.id_ for e in before}.isdisjoint({e.id_ for e in after})
    for episode in [*before, *after]:
        steps = episode.get_observations()[:, 0]
        np.testing.assert_array_equal(steps, np.arange(5))
    assert runner.get_metrics()["num_env_step_failures"].peek() == 1


class Reaching(gym.Env):
    """Reaches its goal at step 2 of its first and third episode, tells it then, and goes on."""

    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, config: Any) -> None:
        self.episodes = 0
        self.key = config["key"]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        self.episodes, self.steps = self.episodes + 1, 0
        return np.zeros(3, np.float32), {}

    def step(self, action: int) -> Any:
        self.steps += 1
        info = {self.key: self.episodes % 2 == 1 and self.steps == 2}
        return np.zeros(3, np.float32), 0.0, self.steps == 5, False, info


@pytest.mark.parametrize(
    ("key", "expected"), [("success", 2 / 3), ("is_success", 2 / 3), ("x", None)]
)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_share_of_successes_is_a_metric(
    runner_of: Any, mode: str, key: str, expected: float | None
) -> None:
    """In chunks of 3 steps: a success may be told in a chunk before the last."""
    config = tiny.tiny_config(Reaching, key=key)
    config.env_runners(
        num_envs_per_env_runner=2, gym_env_vectorize_mode=mode, rollout_fragment_length=3
    )
    runner = runner_of(config)
    ended = 0
    while ended < 6:
        ended += sum(episode.is_done for episode in runner.sample())
    found = runner.get_metrics().get("episode_success_mean")
    assert (found and found.peek()) == (expected and pytest.approx(expected))


def test_metrics_are_over_every_episode_that_ended(runner_of: Any) -> None:
    config = tiny.tiny_config(tiny.LengtheningEnv).reporting(metrics_num_episodes_for_smoothing=2)
    runner = runner_of(config)
    returns = [episode.get_return() for episode in runner.sample(num_episodes=5)]
    metrics = runner.get_metrics()
    for name, values in (("len", [1, 2, 3, 4, 5]), ("return", returns)):
        for end, of in (("mean", np.mean), ("min", np.min), ("max", np.max)):
            assert metrics[f"episode_{name}_{end}"].peek() == pytest.approx(of(values))
    for kind, who in (("agent", "default_agent"), ("module", "default_policy")):
        stats = metrics[f"{kind}_episode_return_mean"][who]
        assert stats.peek() == pytest.approx(np.mean(returns))
    assert metrics["episode_success_mean"].peek() == 1.0
    assert metrics["episode_duration_sec_mean"].peek() > 0
    assert np.isnan(runner.get_metrics()["episode_return_mean"].peek())


@pytest.mark.parametrize("fragment", [1, 3])
def test_every_episode_of_an_iteration_counts_once(fragment: int) -> None:
    """However many of them end in one call: in steps 1 to 3 the first two, 4 to 6 the third."""
    config = tiny.tiny_config(tiny.LengtheningEnv)
    config.env_runners(rollout_fragment_length=fragment)
    config.reporting(min_sample_timesteps_per_iteration=15, metrics_num_episodes_for_smoothing=100)
    with tiny.built(config) as algo:
        results = algo.train()["env_runners"]
    assert results["num_episodes"] == 5
    assert results["episode_len_mean"] == 3
    assert (results["episode_len_min"], results["episode_len_max"]) == (1, 5)


def test_a_fault_in_training_stops_it_and_leaves_whole_steps_in_the_replay(tmp_path: Any) -> None:
    with tiny.built(config_of(tmp_path, "nan")) as algo:
        algo.train()
        kept = algo.replay.stats()["steps"]
        with pytest.raises(RuntimeError) as error:
            algo.train()
        assert isinstance(error.value.__cause__, wrappers.EnvOutputError)
        assert algo.replay.stats()["steps"] == kept == 8  # 2 envs x 4 steps


def test_training_goes_on_with_a_replaced_env(tmp_path: Any) -> None:
    with tiny.built(config_of(tmp_path, "raise", restart=True)) as algo:
        result = tiny.train_until(algo, 2)
        assert np.isfinite(result["env_runners"]["episode_return_mean"])
        assert result["dreamer"]["agent_steps"] % 8 == 0
        assert np.isfinite(algo.replay.sample()["reward"]).all()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_several_runners_with_several_envs(mode: str) -> None:
    config = tiny.tiny_config(length=5)
    config.env_runners(num_env_runners=2, num_envs_per_env_runner=2, gym_env_vectorize_mode=mode)
    with tiny.built(config) as algo:
        result = tiny.train_until(algo, 1)
        assert algo.env_runner_group.num_healthy_remote_workers() == 2
        assert result["dreamer"]["agent_steps"] == result["num_env_steps_sampled_lifetime"]
        assert np.isfinite(result["learners"]["default_policy"]["total_loss"])


def test_a_hanging_env_of_a_remote_runner_is_replaced(tmp_path: Any) -> None:
    """The alarm works in Ray's actors: the runner answers, with its envs built anew."""
    config = config_of(tmp_path, "hang", restart=True).env_runners(
        num_env_runners=1, sample_timeout_s=3
    )
    with tiny.built(config) as algo:
        tiny.train_until(algo, 1)
        assert algo.env_runner_group.num_healthy_remote_workers() == 1
        assert (tmp_path / "flag").exists()


def test_envs_that_cannot_be_built_remotely_say_where_to_look() -> None:
    config = tiny.tiny_config("Pendulum-v1", no_such_key=1).env_runners(num_env_runners=1)
    tiny.start_ray()
    with pytest.raises(RuntimeError, match="no env runner could be built: the errors logged"):
        config.build_algo()


def test_envs_that_cannot_be_built_here_raise_their_own_error() -> None:
    class Unbuildable(tiny.RandomEnv):
        def __init__(self, config: Any) -> None:
            raise IndexError("no such joint")

    with pytest.raises(IndexError, match="no such joint"):
        tiny.tiny_config(Unbuildable).build_algo()


def registered_by_tune() -> str:
    tune.register_env("two-joints", lambda config: tiny.RandomEnv(config))
    return "two-joints"


@pytest.mark.parametrize(
    ("env", "name"),
    [
        (lambda: "CartPole-v1", "CartPole-v1"),
        (lambda: tiny.RandomEnv, "RandomEnv"),
        (lambda: "tiny.RandomEnv", "tiny.RandomEnv"),
        (registered_by_tune, "two-joints"),
        (lambda: register_env(tiny.RandomEnv, "registered"), "RandomEnv"),
    ],
)
def test_every_kind_of_env_is_checked(runner_of: Any, env: Any, name: str) -> None:
    runner = runner_of(tiny.tiny_config(env()))
    checked = runner.env.unwrapped.envs[0]
    while not isinstance(checked, wrappers.CheckedEnv):
        checked = checked.env
    assert checked.env_id == name
    assert len(runner.sample()[0]) == 1
    assert runner.config.env == env()  # as it was given


def start_seeds(runner: DreamerEnvRunner) -> list[int]:
    runner.sample(num_timesteps=2)
    return [env.unwrapped.np_random_seed for env in runner.env.unwrapped.envs]


def test_every_env_of_every_runner_starts_from_a_seed_of_its_own() -> None:
    tiny.start_ray()
    seen: list[int] = []
    for seed in (0, 1):
        config = tiny.tiny_config("CartPole-v1").env_runners(num_envs_per_env_runner=2)
        config.debugging(seed=seed)
        evaluation = config.copy()
        evaluation.in_evaluation = True
        for of, index in ((config, 0), (config, 1), (evaluation, 0)):
            runner, twin = (DreamerEnvRunner(config=of, worker_index=index) for _ in range(2))
            found = start_seeds(runner)
            assert found == start_seeds(twin)
            runner.make_env()  # as after a failure
            seen += [*found, *start_seeds(runner)]
            runner.stop()
            twin.stop()
    assert len(set(seen)) == len(seen) == 24
    assert 0 <= min(seen) and max(seen) <= 2**31


def test_a_resumed_runner_begins_with_other_episodes_and_an_evaluation_with_the_same() -> None:
    config = tiny.tiny_config("CartPole-v1").debugging(seed=3)
    evaluation = config.copy()
    evaluation.in_evaluation = True
    for of, alike in ((config, False), (evaluation, True)):
        first, later = (DreamerEnvRunner(config=of, worker_index=1) for _ in range(2))
        later.set_state({NUM_ENV_STEPS_SAMPLED_LIFETIME: 1000})
        assert (start_seeds(first) == start_seeds(later)) is alike
        first.stop()
        later.stop()


@pytest.mark.parametrize("counted", ["num_episodes", "num_timesteps"])
def test_every_evaluation_of_a_runner_begins_with_the_same_episodes(counted: str) -> None:
    config = tiny.tiny_config("CartPole-v1").debugging(seed=3)
    config.in_evaluation = True
    runner = DreamerEnvRunner(config=config)
    starts = []
    for _ in range(3):
        episodes = runner.sample(**{counted: 1}, force_reset=True)  # as `Algorithm.evaluate` does
        starts.append(tuple(episodes[0].get_observations(0)))
    runner.stop()
    assert len(set(starts)) == 1


class HalfOfSeeds(tiny.CountingEnv):
    """Fails from half of all seeds, in `reset` or in each `step`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.where, self.fails = config["fails"], ""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        self.fails = self.where if seed is not None and seed % 2 else ""
        assert self.fails != "reset"
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        assert self.fails != "step"
        return super().step(action)


@pytest.mark.parametrize("at", ["reset", "step"])
def test_an_env_that_fails_from_a_seed_gets_another_one(runner_of: Any, at: str) -> None:
    for seed in range(4):
        config = tiny.tiny_config(HalfOfSeeds, fails=at, length=50).debugging(seed=seed)
        config.fault_tolerance(restart_failed_sub_environments=True)
        (episode,) = runner_of(config).sample(num_timesteps=3)
        assert len(episode) == 3


def test_options_of_a_gymnasium_id_need_no_registration(runner_of: Any) -> None:
    config = tiny.tiny_config("CartPole-v1", observation="pixels", size=32, action_repeat=2)
    assert runner_of(config).env.single_observation_space.shape == (32, 32, 3)


def test_a_vector_env_of_ones_own_is_left_alone(runner_of: Any) -> None:
    config = tiny.tiny_config("CartPole-v1").env_runners(
        num_envs_per_env_runner=3, gym_env_vectorize_mode="vector_entry_point"
    )
    assert not hasattr(runner_of(config).env.unwrapped, "envs")


def recorded(config: Any, folder: Any) -> Any:
    """The config of a run that writes its steps as columns."""
    return config.offline_data(output=str(folder), output_write_episodes=False)


@pytest.mark.parametrize("rows", [None, 7])
def test_recording_writes_every_step_once(tmp_path: Any, rows: int | None) -> None:
    config = recorded(tiny.tiny_config(tiny.CountingEnv), tmp_path)
    config.offline_data(output_max_rows_per_file=rows, output_write_remaining_data=True)
    with tiny.built(config.env_runners(num_envs_per_env_runner=2)) as algo:
        tiny.train_until(algo, 2)
        steps, vector = algo._agent_steps, algo.env_runner.env.unwrapped
        stored = algo.replay.get_state()["data"]
        algo.env_runner.stop()  # and once more at the end, as beside evaluations
    assert vector.closed
    files = tmp_path.rglob("*.parquet")
    rewards = [parquet.read_table(file, columns=["rewards"])["rewards"] for file in files]
    written = np.concatenate(rewards)
    assert len(written) == steps
    taken = stored["reward"][~stored["is_first"]]  # the newest have not arrived yet
    assert np.isin(taken, written.astype(np.float32)).all()


def test_an_env_that_is_recorded_is_checked(tmp_path: Any) -> None:
    config = recorded(config_of(tmp_path, "nan"), tmp_path / "episodes")
    with tiny.built(config) as algo:
        algo.train()
        with pytest.raises(RuntimeError, match=FAULTS["nan"]):
            algo.train()


def test_an_evaluation_may_leave_recording_out(tmp_path: Any) -> None:
    config = recorded(tiny.tiny_config(), tmp_path)
    config.evaluation(evaluation_config={"output": None}).validate()
    assert config.env_runner_cls is RecordingEnvRunner
    evaluation = config.get_evaluation_config_object()
    evaluation.validate()
    assert evaluation.env_runner_cls is DreamerEnvRunner


def test_deadline_ends_a_wait_and_nothing_else() -> None:
    with pytest.raises(TimeoutError), Deadline(0.05):
        threading.Event().wait(30)
    with Deadline(5), Deadline(None):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_deadline_does_nothing_in_other_threads() -> None:
    done = threading.Event()

    def work() -> None:
        with Deadline(0.05):
            time.sleep(0.1)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done.is_set()


def test_deadline_leaves_an_alarm_of_the_program_alone() -> None:
    rung: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with Deadline(0.05):
            time.sleep(0.2)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_a_creator_keeps_name_and_timeout() -> None:
    env = checked_creator("CartPole-v1", timeout_s=2.0)({})
    assert isinstance(env, wrappers.CheckedEnv)
    assert env._deadline.seconds == 2.0


class Watching(RLlibCallback):
    """Notes the lengths of the chunks that an episode came in."""

    def on_episode_end(self, *, env_runner: Any, **kwargs: Any) -> None:
        env_runner.seen = [len(chunk) for chunk in kwargs["prev_episode_chunks"]]


def test_of_steps_handed_over_only_totals_are_kept(runner_of: Any) -> None:
    runner = runner_of(tiny.tiny_config(tiny.RandomEnv, length=20))
    for _ in range(19):
        runner.sample()
    kept = list(runner._ongoing_episodes_for_metrics.values())
    assert [[len(chunk) for chunk in chunks] for chunks in kept] == [[19]]
    assert not isinstance(kept[0][0], SingleAgentEpisode)
    runner.sample()
    metrics = runner.get_metrics()
    assert metrics["episode_len_mean"].peek() == 20
    assert metrics["episode_return_mean"].peek() == sum(range(1, 21))
    assert not runner._ongoing_episodes_for_metrics


@pytest.mark.parametrize("way", ["class", "function"])
def test_a_callback_is_given_the_chunks_of_its_episode(runner_of: Any, way: str) -> None:
    config = tiny.tiny_config(tiny.RandomEnv, length=4)
    if way == "class":
        config.callbacks(Watching)
    else:
        config.callbacks(on_episode_end=partial(Watching.on_episode_end, None))
    runner = runner_of(config)
    for _ in range(4):
        runner.sample()
    assert runner.seen == [1, 1, 1]
