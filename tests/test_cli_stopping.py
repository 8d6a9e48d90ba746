"""Ctrl-C: trials that run end with a checkpoint, those that wait do not begin."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import ray
from commands import marks
from ray.tune.experiment import Trial
from tiny import start_ray

from rllib_dreamer.cli.app import run
from rllib_dreamer.cli.stopping import StopCondition, StoppableScheduler

FILE = """
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig
config = (
    PPOConfig()
    .environment("CartPole-v1")
    .debugging(seed=tune.grid_search([0, 1, 2]))
    .env_runners(num_env_runners=0)
    .resources(num_cpus_for_main_process={cpus})
    .training(train_batch_size_per_learner=64, num_epochs=1, minibatch_size=64)
    .reporting(min_time_s_per_iteration=0)
)
"""


def test_nothing_is_started_once_a_stop_is_asked_for() -> None:
    states = [Trial.TERMINATED, Trial.RUNNING, Trial.PENDING, Trial.PENDING]
    trials = [SimpleNamespace(status=state) for state in states]
    stopped: list[Any] = []
    finished: list[bool] = []
    controller = SimpleNamespace(
        get_trials=lambda: trials,
        search_alg=SimpleNamespace(set_finished=lambda: finished.append(True)),
        _schedule_trial_stop=stopped.append,
    )
    condition = StopCondition({})
    scheduler = StoppableScheduler(condition)
    assert scheduler.choose_trial_to_run(controller) is trials[2]
    assert (stopped, finished) == ([], [])
    condition.request()
    assert scheduler.choose_trial_to_run(controller) is None
    assert (stopped, finished) == (trials[2:], [True])


def test_ctrl_c_starts_no_waiting_trial(tmp_path: Path) -> None:
    """Each trial takes all CPUs, so that two of the three wait."""
    start_ray()
    file, folder = tmp_path / "seeds.py", tmp_path / "run"
    file.write_text(FILE.format(cpus=int(ray.cluster_resources()["CPU"])))
    over = Event()

    def interrupt() -> None:
        end = time.monotonic() + 600
        while not results(folder) and time.monotonic() < end:
            if over.wait(0.1):
                return
        os.kill(os.getpid(), signal.SIGINT)

    thread = Thread(target=interrupt)
    thread.start()
    try:
        words = ["train", "file", str(file), "--storage-path", str(tmp_path), "--name", "run"]
        limits = ["--stop", '{"iterations": 1000}', "--checkpoint-freq", "0"]
        assert run([*words, *limits]) == 130
    finally:
        over.set()
        thread.join()
    assert len(results(folder)) == len(marks(folder)) == 1


def results(folder: Path) -> list[Path]:
    """The trials that have trained."""
    return [file for file in folder.glob("*/result.json") if file.stat().st_size]
