"""Each tuned example says what it is, and trains: loaded as `rllib train file` does, shrunk."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import tiny

from rllib_dreamer.cli.experiment import Experiment, experiment_from_file
from rllib_dreamer.cli.options import TrainOptions

FOLDER = Path(__file__).resolve().parents[1] / "tuned_examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
ITERATIONS = 3
SHRINK = (
    "model_size=1M",
    "training_ratio=2",
    "batch_size_B=2",
    "batch_length_T=4",
    "horizon_H=3",
    "replay_capacity=1000",
    "learner_threads=1",
    "num_env_runners=0",
    "num_gpus_per_learner=0",
    "num_envs_per_env_runner=1",
    "min_time_s_per_iteration=0",
    "min_sample_timesteps_per_iteration=16",
)


def small(path: Path) -> Experiment:
    experiment = experiment_from_file(path, TrainOptions(set=list(SHRINK)))
    experiment.config.rl_module(model_config=tiny.MODEL)
    return experiment


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_docstring_says_what_to_run_and_to_expect(path: Path) -> None:
    docstring = path.read_text().split('"""')[1]
    assert f"    rllib train file tuned_examples/{path.name}\n" in docstring
    for part in ("Protocol", "Expected", "Time"):
        assert re.search(rf"^{part}: \S", docstring, re.MULTILINE), f"no '{part}:' in {path.name}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_trains(path: Path) -> None:
    experiment = small(path)
    assert experiment.limits
    with tiny.built(experiment.config) as algo:
        results = [algo.train() for _ in range(ITERATIONS)]
    updates = [result["dreamer"]["updates"] for result in results]
    assert 0 < updates[0] < updates[1] < updates[2]
    assert math.isfinite(results[-1]["learners"]["default_policy"]["total_loss"])
    reported = {"env_runners/episode_return_mean", *_flat(results[-1])}
    assert experiment.limits.keys() <= reported, "a limit on a metric that is not reported"


def _flat(result: dict) -> set[str]:
    """Names as `stop` has them."""
    names = set(result)
    for key, value in result.items():
        if isinstance(value, dict):
            names |= {f"{key}/{name}" for name in value}
    return names
