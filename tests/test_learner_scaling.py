"""From the settings for one learner to those for several."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from ray import tune
from tiny import RandomEnv

from rllib_dreamer.cli.errors import CommandError
from rllib_dreamer.cli.experiment import experiment_from_names
from rllib_dreamer.cli.options import TrainOptions
from rllib_dreamer.dreamer import DreamerConfig
from rllib_dreamer.learner_scaling import scale_rate


def settings(config: DreamerConfig) -> tuple[Any, ...]:
    return config.num_learners, config.batch_size_B, config.num_envs_per_env_runner, config.lr


def test_batch_and_envs_grow_with_n_and_rates_with_its_root(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = DreamerConfig().environment(RandomEnv).env_runners(num_envs_per_env_runner=2)
    config.training(actor_lr=1e-5, critic_lr=[[0, 1e-4], [100, 2e-4]])
    assert config.scale_to_learners(4) is config
    assert settings(config) == (4, 64, 8, 8e-5)
    assert config.actor_lr == 2e-5
    assert config.critic_lr == [[0, 2e-4], [100, 4e-4]]
    assert config.world_model_lr == 8e-5
    config.validate()
    assert capsys.readouterr().out.splitlines() == [
        "settings for 4 learners:",
        "  num_learners 0 -> 4",
        "  batch_size_B 16 -> 64",
        "  num_envs_per_env_runner 2 -> 8",
        "  lr 4e-05 -> 8e-05",
        "  actor_lr 1e-05 -> 2e-05",
        "  critic_lr [[0, 0.0001], [100, 0.0002]] -> [[0, 0.0002], [100, 0.0004]]",
        "  num_gpus_per_learner is 0: every learner computes on the CPU",
    ]


def test_rates_rise_over_the_first_tenth() -> None:
    config = DreamerConfig().environment(RandomEnv).scale_to_learners(2, total_steps=5000)
    assert config.lr == [[0, 4e-5], [500, 5.65685e-5]]
    config.validate()


def test_a_schedule_keeps_its_steps() -> None:
    assert scale_rate([[0, 1.0], [7, 3.0]], 4, 1000) == [[0, 2.0], [7, 6.0]]
    assert scale_rate(1.0, 4, 5) == [[0, 1.0], [1, 2.0]]
    assert scale_rate(1.0, 1, 1000) == 1.0


@pytest.mark.parametrize("travel", [lambda c: c, lambda c: pickle.loads(pickle.dumps(c))])
def test_calling_again_starts_from_one_learner(travel: Any) -> None:
    config = DreamerConfig().scale_to_learners(4, total_steps=1000)
    once = settings(config)
    config = travel(config)
    assert settings(config.scale_to_learners(4, total_steps=1000)) == once
    assert settings(config.scale_to_learners(2))[:3] == (2, 32, 2)
    assert settings(config.scale_to_learners(1)) == settings(DreamerConfig())


def test_what_is_set_afterwards_wins(capsys: pytest.CaptureFixture[str]) -> None:
    config = DreamerConfig().scale_to_learners(4).training(batch_size_B=40, lr=1e-4)
    for _ in range(2):
        config.scale_to_learners(8)
        assert settings(config) == (8, 40, 8, 1e-4)
    assert "batch_size_B stays 40" in capsys.readouterr().out


def test_a_copy_scales_by_itself() -> None:
    config = DreamerConfig().scale_to_learners(4)
    config.copy(copy_frozen=False).scale_to_learners(2)
    assert settings(config.scale_to_learners(4))[:2] == (4, 64)


@pytest.mark.parametrize("value", [0, -2, 1.5, True, "2"])
def test_a_number_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"num_learners={value!r} must be a whole number >= 1"):
        DreamerConfig().scale_to_learners(value)
    with pytest.raises(ValueError, match=f"total_steps={value!r} must be a whole number >= 1"):
        DreamerConfig().scale_to_learners(2, total_steps=value)


def test_a_search_is_refused_before_and_taken_after() -> None:
    search = tune.grid_search([1e-4, 2e-4])
    config = DreamerConfig().training(lr=search)
    with pytest.raises(ValueError, match=r"lr=.*cannot be scaled.*search afterwards"):
        config.scale_to_learners(2)
    assert config.batch_size_B == DreamerConfig().batch_size_B
    assert DreamerConfig().scale_to_learners(2).training(lr=search).lr == search


@pytest.mark.parametrize("rate", [[0, 1e-4], [[0, 1e-4], [1]], [[0, "1e-4"]]])
def test_a_malformed_schedule_is_refused_before(rate: Any) -> None:
    with pytest.raises(ValueError, match=r"lr=.*cannot be scaled: a schedule is a list of pairs"):
        DreamerConfig().training(lr=rate).scale_to_learners(2)


def command(**options: Any) -> Any:
    return experiment_from_names(TrainOptions(env="dmc/walker-walk", learners=2, **options)).config


def test_the_option_of_the_command_knows_the_length_of_the_run() -> None:
    config = command(stop='{"env_steps": 10000}')
    assert settings(config) == (2, 32, 2, [[0, 4e-5], [500, 5.65685e-5]])  # 2 env steps an action
    assert command(stop='{"agent_steps": 10000}').lr[1][0] == 1000
    assert command(stop='{"dreamer/env_steps": 10000}').lr[1][0] == 500
    repeated = command(stop='{"env_steps": 10000}', set=["env_config.action_repeat=4"])
    assert repeated.lr[1][0] == 250
    assert command().lr == 5.65685e-5


def test_set_wins_over_the_option() -> None:
    config = command(set=["batch_size_B=20", "num_gpus_per_learner=1"])
    assert settings(config)[:3] == (2, 20, 2)
    assert config.num_gpus_per_learner == 1


def test_the_option_is_for_our_algorithm() -> None:
    with pytest.raises(CommandError, match="--learners is for DreamerTorch, not for a PPOConfig"):
        experiment_from_names(TrainOptions(run="PPO", env="CartPole-v1", learners=2))
    with pytest.raises(CommandError, match="--learners 0: num_learners=0 must be"):
        experiment_from_names(TrainOptions(env="CartPole-v1", learners=0))
