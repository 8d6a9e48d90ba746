"""A learner that is killed under `rllib train`: stopped with the way back, or resumed by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import finish, iterations, start

KILLED = """
import os, pathlib, signal
from ray.rllib.callbacks.callbacks import RLlibCallback
from tiny import CountingEnv, tiny_config

class KillLearner(RLlibCallback):
    def on_train_result(self, *, algorithm, result, **kwargs):
        mark = pathlib.Path({mark!r})
        if algorithm.iteration == 3 and not mark.exists():
            mark.touch()
            os.kill(algorithm._on_learners(lambda learner: os.getpid())[0], signal.SIGKILL)

config = tiny_config(CountingEnv, length=60).callbacks(KillLearner)
config.reporting(min_sample_timesteps_per_iteration=30)
config.learners(num_learners=1)
stop = {{"training_iteration": 6}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("failures", [0, 1])
def test_a_killed_learner(failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost are the iterations since the last checkpoint, of which there is one every two."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    file = tmp_path / "own.py"
    file.write_text(KILLED.format(mark=str(tmp_path / "mark")))
    words = ["train", "file", file, "--storage-path", tmp_path, "--name", "run"]
    code, _, err = finish(start(*words, "--checkpoint-freq", 2, "--max-failures", failures))
    done = iterations(tmp_path / "run")
    if failures:
        assert (code, err) == (0, "")
        assert done[-4:] == [3, 4, 5, 6]
    else:
        assert code == 1
        assert err.count("\n") == 1 and "a learner was lost" in err
        assert f"add --resume {tmp_path / 'run'} to go on from the last checkpoint" in err
        assert done[-1] < 6
