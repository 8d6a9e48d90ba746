"""Sampling ahead: what remote EnvRunners do while the learner works, and what is counted."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny import CountingEnv, built, tiny_config

from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch
from rllib_dreamer.sampling import Samples
from rllib_dreamer.training_ratio import TrainingRatio

RUNNERS = 2


class LoggingEnv(CountingEnv):
    """Adds a byte to the file `log` at every step, which takes `seconds`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.log, self.seconds = config["log"], config.get("seconds", 0.0)

    def step(self, action: Any) -> Any:
        time.sleep(self.seconds)
        with open(self.log, "ab") as file:
            file.write(b".")
        return super().step(action)


def config_of(log: Path, **env_config: Any) -> DreamerConfig:
    log.touch()
    config = tiny_config(LoggingEnv, training={"training_ratio": 24}, log=str(log), **env_config)
    return config.env_runners(num_env_runners=RUNNERS)


class Logged(NamedTuple):
    """An algorithm with the log of its environments."""

    algo: DreamerTorch
    log: Path


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    """Its first test finds it as it was built, each later one as the one before has left it."""
    log = tmp_path_factory.mktemp("logged") / "log"
    with built(config_of(log)) as algo:
        yield Logged(algo, log)


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within two minutes."""
    deadline = time.monotonic() + 120
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return met


def test_runners_step_while_the_learner_works(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During every update the environments take the steps of the next round, and no more."""
    algo, log, ahead = *logged, []
    update = algo._update

    def watched() -> None:
        wait_for(lambda: log.stat().st_size == algo._agent_steps + RUNNERS)
        ahead.append(log.stat().st_size - algo._agent_steps)
        update()

    monkeypatch.setattr(algo, "_update", watched)
    expected = exact_updates(algo, 25)
    assert expected == len(ahead) > 5
    assert set(ahead) == {RUNNERS}


def exact_updates(algo: DreamerTorch, iterations: int) -> int:
    """Trains, and holds the counters of each iteration against exact arithmetic."""
    reference, expected = TrainingRatio(24, 32), 0
    for iteration in range(iterations):
        result = algo.train()
        ours = result["dreamer"]
        assert ours["agent_steps"] == RUNNERS * (iteration + 1)
        assert ours["agent_steps"] == result["num_env_steps_sampled_lifetime"]
        if ours["updates"]:
            expected += reference.updates(ours["agent_steps"])
        assert ours["updates"] == expected
    return expected


@pytest.mark.parametrize(
    ("component", "rounds"), [(None, 1), ("learner_group/learner/rl_module", 2)]
)
def test_what_was_sampled_before_a_restore_is_dropped(
    logged: Logged, tmp_path: Path, component: str | None, rounds: int
) -> None:
    algo = logged.algo
    before = algo.train()["dreamer"]["agent_steps"]
    path = Path(algo.save_to_path(tmp_path / "checkpoint"))
    algo.train()
    assert algo._sampler._in_flight() == [1, 2]
    algo.restore_from_path(path / (component or ""), component=component)
    assert algo._sampler._in_flight() == []
    assert algo.train()["dreamer"]["agent_steps"] == before + rounds * RUNNERS


def test_late_samples_belong_to_the_next_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path / "log", seconds=0.05).env_runners(rollout_fragment_length=60)
    with built(config) as algo:  # an env is given the same time for a step: here it stays long
        brief = algo.config.copy(copy_frozen=False).env_runners(sample_timeout_s=1)
        algo._sampler._config = brief
        counts = []
        assert wait_for(lambda: counts.append(take(algo)) or sum(counts) >= 60 * RUNNERS)
        assert counts[0] == 0
        assert sum(counts) == algo._agent_steps
    for runner in (1, 2):
        assert f"EnvRunner {runner} gave no sample within sample_timeout_s=1 " in caplog.text


def test_an_iteration_without_any_samples() -> None:
    """As when every runner takes longer than the iteration to start."""
    with built(tiny_config().reporting(min_sample_timesteps_per_iteration=0)) as algo:
        algo._sampler.next = lambda: Samples([], [], False)  # type: ignore[method-assign]
        result = algo.train()
    assert result["dreamer"]["agent_steps"] == 0
    assert math.isnan(result["env_runners"]["episode_return_mean"])


def take(algo: DreamerTorch) -> int:
    """Samples a round and returns its steps."""
    before = algo._agent_steps
    algo._sample()
    return algo._agent_steps - before


class FailingEnv(CountingEnv):
    def step(self, action: Any) -> Any:
        raise ValueError("no such robot")


def test_a_run_without_samples_stops(caplog: pytest.LogCaptureFixture) -> None:
    """It waits in peace for as long as it may, once its last runner is gone."""
    config = tiny_config(FailingEnv).env_runners(num_env_runners=1)
    config.fault_tolerance(restart_failed_env_runners=False, ignore_env_runner_failures=True)
    config.fault_tolerance(env_runner_restore_timeout_s=2)
    with built(config) as algo:
        rounds = []
        with pytest.raises(RuntimeError, match=r"no env runner gave a sample.*0 of 1 are healthy"):
            while len(rounds) < 100:
                rounds.append(algo._sampler.next())
    assert len(rounds) < 10 and len(caplog.records) < 20
    assert all(samples.episodes == [] for samples in rounds)


class StuckEnv(CountingEnv):
    """Is stuck in its third step, where no signal reaches it; only in runner 2, and only once."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.mark, self.worker = Path(config["mark"]), config.worker_index

    def step(self, action: Any) -> Any:
        if self.worker == 2 and self.t == 2 and not self.mark.exists():
            self.mark.touch()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            time.sleep(1000)
        return super().step(action)


def give_time(algo: DreamerTorch, sample_timeout_s: float, restore_timeout_s: float = 600) -> None:
    """Changes what the sampler waits for, not what an env is given for a step."""
    config = algo.config.copy(copy_frozen=False).env_runners(sample_timeout_s=sample_timeout_s)
    config.fault_tolerance(env_runner_restore_timeout_s=restore_timeout_s)
    algo._sampler._config = config


@contextmanager
def stuck(mark: Path) -> Iterator[DreamerTorch]:
    """An algorithm with two runners, of which the second is stuck and known to be late."""
    config = tiny_config(StuckEnv, mark=str(mark)).env_runners(num_env_runners=2)
    config.fault_tolerance(delay_between_env_runner_restarts_s=0)
    with built(config) as algo:
        assert [take(algo), take(algo)] == [2, 2]
        give_time(algo, sample_timeout_s=1)
        assert wait_for(lambda: take(algo) < 2 and list(algo._sampler._late) == [2])
        yield algo


def test_a_stuck_runner_holds_up_no_other_and_is_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with stuck(tmp_path / "mark") as algo:
        assert "EnvRunner 2 gave no sample within sample_timeout_s=1 seconds" in caplog.text
        give_time(algo, sample_timeout_s=1000)
        assert [take(algo) for _ in range(3)] == [1, 1, 1]
        give_time(algo, sample_timeout_s=1000, restore_timeout_s=0)
        assert take(algo) == 1
        assert "EnvRunner 2 gave no sample for" in caplog.text
        give_time(algo, sample_timeout_s=60)

        def restored() -> bool:
            assert take(algo) == 1
            return algo.restore_env_runners(algo.env_runner_group) == [2]

        assert wait_for(restored)
        assert wait_for(lambda: take(algo) == 2)
        assert not algo._sampler._late


def test_a_stuck_runner_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with stuck(tmp_path / "mark") as algo:
        runners = algo.env_runner_group
    assert runners.num_remote_env_runners() == 0


def test_the_local_runner_stays_in_its_thread_beside_evaluations() -> None:
    """RLlib trains in a new one each time; what draws by OpenGL cannot follow."""
    threads, closed_in = set(), []

    class ThreadEnv(CountingEnv):
        def step(self, action: Any) -> Any:
            threads.add(threading.get_ident())
            return super().step(action)

        def close(self) -> None:
            closed_in.append(threading.get_ident())

    config = tiny_config(ThreadEnv).evaluation(
        evaluation_interval=2, evaluation_num_env_runners=1, evaluation_parallel_to_training=True
    )
    with built(config) as algo:
        for _ in range(4):
            algo.train()
    assert threads == set(closed_in) and len(threads) == 1
