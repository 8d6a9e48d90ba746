"""Runs the `rllib` command in processes of its own, and reads what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

#: Trains PPO on an environment that the file itself registers.
PPO_FILE = """
import gymnasium
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune import register_env

class OwnEnv(gymnasium.Wrapper):
    pass

register_env("own-cartpole", lambda config: OwnEnv(gymnasium.make("CartPole-v1")))
config = (
    PPOConfig()
    .environment("own-cartpole")
    .env_runners(num_env_runners=0)
    .training(train_batch_size_per_learner=64, num_epochs=1, minibatch_size=64)
    .reporting(min_time_s_per_iteration=0)
)
stop = {"training_iteration": 2}
"""


class Finished(NamedTuple):
    """A command's exit code and output."""

    code: int
    out: str
    err: str


STARTED: list[subprocess.Popen[str]] = []


def start(*words: object) -> subprocess.Popen[str]:
    code = "from rllib_dreamer.cli import main; main()"
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> Finished:
    out, err = process.communicate(timeout=240)
    return Finished(process.returncode, out, err)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def iterations(folder: Path) -> list[int]:
    """The iterations of a run's results; one that is being written does not count yet."""
    texts = [file.read_text() for file in folder.glob("*/result.json")]
    lines = [line for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]
    return [json.loads(line)["training_iteration"] for line in lines]


def marks(folder: Path) -> list[int]:
    files = folder.glob("*/checkpoint_*/.metadata.json")
    found = [json.loads(file.read_text() or "{}") for file in files]
    return sorted(item["rllib_dreamer"]["training_iteration"] for item in found if item)
