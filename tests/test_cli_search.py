"""Searches on the command line: what their trials need is checked before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig

from rllib_dreamer.cli import train
from rllib_dreamer.cli.app import run
from rllib_dreamer.cli.errors import CommandError

SEEDS = 'seed={"grid_search": [0, 1, 2]}'


class Started(Exception):
    """The checks let the run pass."""


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that begins a run on two CPUs gets as far as Tune."""

    @contextmanager
    def session(*args: Any) -> Iterator[bool]:
        yield True

    def start(*args: Any) -> None:
        raise Started

    monkeypatch.setattr(train, "ray_session", session)
    monkeypatch.setattr(train, "_run", start)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training_ratio=0", SEEDS], "`training_ratio`=0 must be a number > 0"),
        (['training_ratio={"grid_search": [32, 0]}'], "`training_ratio`=0 must be a number > 0"),
        (["num_env_runners=500", SEEDS], "needs 501 CPUs"),
        (['num_env_runners={"grid_search": [1, 500]}'], "needs 501 CPUs"),
        (['seed={"grid_search": 3}'], "a search of the config cannot be drawn from"),
        (['seed={"grid_search": []}'], "a grid_search of the config is empty"),
    ],
)
@pytest.mark.usefixtures("no_run")
def test_what_no_trial_could_do_is_one_line_and_exit_2(
    settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    place = ["--storage-path", str(tmp_path)]
    assert run(["train", "--env", "CartPole-v1", *words, *place]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.usefixtures("no_run")
def test_a_search_that_fits_is_run(tmp_path: Path) -> None:
    with pytest.raises(Started):
        run(["train", "--env", "CartPole-v1", "--set", SEEDS, "--storage-path", str(tmp_path)])


def test_samples_hold_values_in_place_of_searches() -> None:
    from rllib_dreamer.cli.search import has_search, samples

    config = PPOConfig().training(
        lr=tune.grid_search([0.1, 0.2]),
        gamma=tune.uniform(0.5, 0.6),
        lambda_=tune.sample_from(lambda spec: spec.config.lr),
    )
    config.environment("CartPole-v1", env_config={"sizes": [1, tune.grid_search([2, 3])]})
    drawn = samples(config)
    grid = sorted((c.lr, c.lambda_, c.env_config["sizes"]) for c in drawn)
    assert grid == [(rate, rate, [1, size]) for rate in (0.1, 0.2) for size in (2, 3)]
    assert all(0.5 <= c.gamma <= 0.6 for c in drawn)
    assert has_search(config.to_dict()) and not any(has_search(c.to_dict()) for c in drawn)
    assert samples(drawn[0]) == [drawn[0]]


def test_a_search_that_fails_is_told() -> None:
    from rllib_dreamer.cli.search import samples

    config = PPOConfig().training(lr=tune.sample_from(lambda spec: 1 / 0))
    with pytest.raises(CommandError, match="ZeroDivisionError: division by zero"):
        samples(config)
