"""Ray Tune around it: trials at once, stopped, exploited by a population, restored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from tiny import RandomEnv, start_ray, tiny_config

#: Agent steps without updates: from then on a batch can be drawn, and each step asks for one.
BEGIN = 33
SETTINGS = {"verbose": 0, "checkpoint_config": tune.CheckpointConfig(checkpoint_frequency=1)}


class FailingEnv(RandomEnv):
    """Raises in its 30th step, as long as a file exists."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.file, self.steps = Path(config["file"]), 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps == 30 and self.file.exists():
            raise OSError("the simulator is gone")
        return super().step(action)


@pytest.mark.slow
def test_tuner_restore_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    start_ray()
    broken = tmp_path / "broken"
    broken.touch()
    config = tiny_config(FailingEnv, file=str(broken))
    config.reporting(min_sample_timesteps_per_iteration=10)
    run = tune.RunConfig(
        name="run", storage_path=str(tmp_path), stop={"training_iteration": 6}, **SETTINGS
    )
    failed = tune.Tuner("DreamerTorch", param_space=config, run_config=run).fit()[0]
    assert "the simulator is gone" in str(failed.error)
    assert failed.metrics["training_iteration"] == 2

    broken.unlink()
    tuner = tune.Tuner.restore(str(tmp_path / "run"), "DreamerTorch", resume_errored=True)
    restored = tuner.fit()[0]
    assert restored.error is None
    assert restored.metrics["training_iteration"] == 6
    rows = restored.metrics_dataframe.drop_duplicates("training_iteration", keep="last")
    assert rows["dreamer/agent_steps"].tolist() == [10, 20, 30, 40, 50, 60]
    updates = rows["dreamer/updates"].tolist()
    assert updates == [0, 0, 0, 40 - BEGIN, 50 - BEGIN, 60 - BEGIN]


@pytest.mark.slow
def test_a_population_exploits_and_explores(tmp_path: Path) -> None:
    """The trial with fewer updates takes over weights, counters and settings of the other one."""
    start_ray()
    config = tiny_config(training={"training_ratio": tune.grid_search([8, 32])})
    config.reporting(min_sample_timesteps_per_iteration=10)
    population = PopulationBasedTraining(
        time_attr="training_iteration",
        metric="dreamer/updates",
        mode="max",
        perturbation_interval=6,
        hyperparam_mutations={"lr": [3e-4]},
        quantile_fraction=0.5,
        synch=True,
    )
    results = tune.Tuner(
        "DreamerTorch",
        param_space=config,
        tune_config=tune.TuneConfig(scheduler=population),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path), stop={"training_iteration": 8}, **SETTINGS
        ),
    ).fit()
    assert not results.errors, results.errors
    assert [r.config["training_ratio"] for r in results] == [32, 32]
    assert sorted(r.config["lr"] for r in results) == [3e-4, 1e-3]
    for result in results:
        learner = result.metrics["learners"][DEFAULT_MODULE_ID]
        assert learner["world_model_learning_rate"] == pytest.approx(result.config["lr"])
        assert result.metrics["dreamer"]["agent_steps"] == 80
        assert result.metrics["dreamer"]["updates"] == 80 - BEGIN


@pytest.mark.slow
def test_asha_stops_the_worse_of_trials_that_share_the_machine(tmp_path: Path) -> None:
    start_ray()
    config = tiny_config(training={"training_ratio": tune.grid_search([32, 16, 8])})
    config.reporting(min_sample_timesteps_per_iteration=10)
    halving = ASHAScheduler(
        time_attr="training_iteration",
        metric="dreamer/updates",
        mode="max",
        grace_period=6,
        reduction_factor=2,
        max_t=12,
    )
    results = tune.Tuner(
        "DreamerTorch",
        param_space=config,
        tune_config=tune.TuneConfig(scheduler=halving, max_concurrent_trials=3),
        run_config=tune.RunConfig(storage_path=str(tmp_path), **SETTINGS),
    ).fit()
    assert not results.errors, results.errors
    best = results.get_best_result("dreamer/updates", "max")
    assert best.config["training_ratio"] == 32
    assert best.metrics["training_iteration"] == 12
    assert min(r.metrics["training_iteration"] for r in results) < 12


def test_asha_takes_the_mean_return_before_an_episode_has_ended(tmp_path: Path) -> None:
    start_ray()
    config = tiny_config(length=15).reporting(min_sample_timesteps_per_iteration=10)
    results = tune.Tuner(
        "DreamerTorch",
        param_space=config,
        tune_config=tune.TuneConfig(
            metric="env_runners/episode_return_mean",
            mode="max",
            scheduler=ASHAScheduler(grace_period=1, max_t=3),
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), **SETTINGS),
    ).fit()
    assert not results.errors, results.errors
    best = results.get_best_result()
    returns = best.metrics_dataframe["env_runners/episode_return_mean"].tolist()
    assert math.isnan(returns[0])
    assert returns[1:] == [sum(range(1, 16))] * 2
    header, *rows = (Path(best.path) / "progress.csv").read_text().splitlines()
    column = header.split(",").index("env_runners/episode_return_mean")
    assert [row.split(",")[column] for row in rows] == ["nan", "120.0", "120.0"]
