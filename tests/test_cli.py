"""The `rllib` command: usage errors, files, overrides, settings of a run."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import PPO_FILE
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune import Checkpoint

from rllib_dreamer.cli.app import resume_without_path, run
from rllib_dreamer.cli.errors import CommandError
from rllib_dreamer.cli.experiment import experiment_from_file, experiment_from_names
from rllib_dreamer.cli.options import TrainOptions
from rllib_dreamer.cli.overrides import apply_overrides, check_stop, parse_stop, parse_value
from rllib_dreamer.cli.session import ray_session
from rllib_dreamer.cli.stopping import STOP_ALIASES
from rllib_dreamer.cli.summary import evaluation_hint
from rllib_dreamer.cli.train import (
    checkpoint_config,
    run_experiment,
    spread_seeds,
    wandb_loggers,
)
from rllib_dreamer.dreamer_config import DreamerConfig


@pytest.fixture(scope="module")
def ppo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("files") / "own.py"
    file.write_text(PPO_FILE)
    return file


def options(**values: Any) -> TrainOptions:
    return TrainOptions(**values)


# ---- usage errors: one line, exit 2 ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "file", "{dir}/owm.py"], r"no such file: .*owm.py \(did you mean own.py\?\)"),
        (["train", "file"], "Missing argument 'FILE.py'"),
        (["train"], "which environment to train on"),
        (["train", "file", "{dir}/own.py", "--stpo", "1"], "No such option.*--stpo.*--stop"),
        (["train", "--run", "PPO", "--env", "CartPole-v7"], "Unknown env .*CartPole-v1"),
        (["train", "--run", "PPPO", "--env", "CartPole-v1"], "unknown algorithm 'PPPO'.*PPO"),
        (["train", "file", "{dir}/own.py", "--run", "DQN"], "--run DQN does not fit the file"),
        (["train", "file", "{dir}/own.py", "--set", "lrr=1"], "no field 'lrr'.*did you mean.*lr"),
        (["train", "file", "{dir}/own.py", "--stop", "{x"], "--stop is no valid JSON"),
        (
            ["train", "file", "{dir}/own.py", "--stop", '{"env_stepz": 5}'],
            r"--stop: unknown metric 'env_stepz' \(did you mean env_steps",
        ),
        (
            ["train", "file", "{dir}/own.py", "--storage-path", "{dir}/own.py"],
            "--storage-path: .*own.py: File exists",
        ),
        (
            ["train", "file", "{dir}/own.py", "--storage-path", "s3://bucket"],
            "--storage-path: got s3://bucket; must be a local or mounted folder",
        ),
        (
            ["train", "--env", "CartPole-v1", "--set", "num_envs_per_env_runner=0"],
            "`num_envs_per_env_runner`=0 must be a whole number >= 1.$",
        ),
        (["train", "--env", "CartPole-v1", "--set", "num_gpus=1"], "set `num_gpus_per_learner`"),
        (["train", "file", "{dir}/own.py", "--set", "num_gpus=1"], "set `num_gpus_per_learner`"),
        (["train", "--env", "CartPole-v1", "--set", "seed=abc"], "`seed`='abc' must be None or a"),
        (["train", "file", "{dir}/own.py", "--set", "seed=1.5"], "`seed`=1.5 must be None or a"),
        (["train", "file", "{dir}/own.py", "--set", "callbacks=foo"], "--set callbacks: .*foo"),
        (["train", "file", "{dir}/own.py", "--set", "env_config={[1]:2}"], "env_config wants a"),
        (["plot", "{dir}/none"], "run: got '.*none', which does not exist"),
        (["train", "file", "{dir}/own.py", "--resume", "{dir}/none"], "--resume: .* is no folder"),
        (["train", "file", "{dir}/own.py", "--wandb-key", "k"], "--wandb-project is missing"),
        (["train", "file", "{dir}/own.py", "--set", "minibatch_size=999"], "config is refused"),
        (["train", "--env", "a", "file", "{dir}/own.py"], "put the options behind the file"),
        (["trian"], "No such command 'trian'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    words: list[str], message: str, ppo_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run([word.format(dir=ppo_file.parent) if "{d" in word else word for word in words])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1 and error.startswith("rllib: ")
    with pytest.raises(CommandError, match=message):
        raise CommandError(error)


def test_verbose_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "file", "missing.py", "-v"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no 'config'"),
        ("config = {}", "a 'config' of type dict"),
        ("config = (", r"line 1: "),
        ("import nowhere_at_all", r"bad\.py, line 1, fails: ModuleNotFoundError"),
        ("def f():\n    import json\n    json.loads('')\n\nf()", r"bad\.py, line 3, fails: JSON"),
        ("x = 1\nraise ValueError('no')", r"bad\.py, line 2, fails: ValueError: no$"),
        ("x = 1\nexec('y = (')", r"bad\.py, line 2, fails: SyntaxError"),
        (PPO_FILE + "\nstop = 5", "must map metric names to limits, got int"),
        (
            "from ray.rllib.algorithms.algorithm_config import AlgorithmConfig\n"
            "config = AlgorithmConfig()",
            "belongs to no algorithm",
        ),
        ("from ray.rllib.algorithms.ppo import PPOConfig\nconfig = PPOConfig()", "no environment"),
    ],
)
def test_unusable_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(CommandError, match=message):
        experiment_from_file(file, options())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == 0
    assert "ray 2" in capsys.readouterr().out


def test_without_words_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    shown = capsys.readouterr()
    assert "Usage: rllib" in shown.out and not shown.err


def test_help_lists_the_shared_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "--help"], ["train", "file", "--help"]):
        assert run(words) == 0
        text = capsys.readouterr().out
        assert "--set" in text and "--max-failures" in text


def test_bare_resume_gets_an_empty_path() -> None:
    assert resume_without_path(["a", "--resume", "--stop", "{}"])[1] == "--resume="
    assert resume_without_path(["a", "--resume"]) == ["a", "--resume="]
    assert resume_without_path(["--resume", "here"]) == ["--resume", "here"]


# ---- --set and --stop ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1_000", 1000),
        ("true", True),
        ("None", None),
        ("[[0, 1]]", [[0, 1]]),
        ("XS", "XS"),
        ('{"a": 1}', {"a": 1}),
        ("", ""),
    ],
)
def test_values_are_typed(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_overrides_reach_plain_dict_and_aliased_fields() -> None:
    config = PPOConfig().environment("CartPole-v1", env_config={"a": 1})
    settings = [
        "lr=0.5",
        "env_config.b.c=2",
        "lambda=0.9",
        "model_config.x=3",
        "model_config.y=4",
        "num_env_runners=2",
    ]
    apply_overrides(config, settings)
    assert (config.lr, config.lambda_, config.num_env_runners) == (0.5, 0.9, 2)
    assert config.env_config == {"a": 1, "b": {"c": 2}}
    assert config._model_config == {"x": 3, "y": 4}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "wants key=value"),
        ("num_env_runer=1", "no field 'num_env_runer'.*num_env_runners"),
        ("lr=fast", "lr wants a number, got 'fast'"),
        ("explore=3", "explore wants true or false, got 3"),
        ("env_config=3", "env_config wants a dict"),
        ("lr.a=3", "'lr' is no dict"),
        ("algo_class=3", "no field 'algo_class'"),
        ("sample_collector=foo", "sample_collector wants a class"),
    ],
)
def test_bad_override(setting: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        apply_overrides(PPOConfig(), [setting])


def test_options_win_over_the_file(ppo_file: Path) -> None:
    given = options(env="CartPole-v1", stop='{"env_steps": 9}', set=["lr=0.25"])
    experiment = experiment_from_file(ppo_file, given)
    assert experiment.config.env == "CartPole-v1"
    assert experiment.config.lr == 0.25
    assert experiment.limits == {"env_steps": 9}
    assert experiment_from_file(ppo_file, options()).limits == {"training_iteration": 2}


def test_algorithm_by_name() -> None:
    experiment = experiment_from_names(options(run="ppo", env="CartPole-v1"))
    assert type(experiment.config) is PPOConfig
    assert experiment.limits == {}


def test_another_kind_of_env_drops_the_env_config_of_the_file() -> None:
    walker = Path(__file__).parents[1] / "tuned_examples" / "walker.py"
    kept = {"action_repeat": 2}
    for env, expected in (("dmc/hopper-hop", kept), ("DMC/hopper/hop", kept), ("ALE/Pong-v5", {})):
        assert experiment_from_file(walker, options(env=env)).config.env_config == expected
    given = options(env="CartPole-v1", set=["env_config.action_repeat=3"])
    assert experiment_from_file(walker, given).config.env_config == {"action_repeat": 3}


def test_samples_have_seeds_of_their_own() -> None:
    config = PPOConfig().debugging(seed=3)
    assert spread_seeds(config, 1) == 1 and config.seed == 3
    assert spread_seeds(config, 2) == 1 and config.seed == tune.grid_search([3, 4])
    assert spread_seeds(config, 2) == 2 and config.seed == tune.grid_search([3, 4])
    assert spread_seeds(PPOConfig(), 2) == 2


@pytest.mark.parametrize("stop", ['{"a": "b"}', '{"a": true}', "[1]", "3"])
def test_stop_must_map_names_to_numbers(stop: str) -> None:
    with pytest.raises(CommandError, match="must"):
        parse_stop(stop)


def test_no_stop_is_no_limit() -> None:
    assert check_stop(None, "here") == {}
    others = ["env_runners/episode_len_mean", "training_iteration", "num_agent_steps_sampled"]
    assert list(check_stop(dict.fromkeys([*others, *STOP_ALIASES], 1), "here"))[:3] == others


def test_steps_are_short_for_a_stop(ppo_file: Path) -> None:
    assert experiment_from_file(ppo_file, options(steps=500)).limits == {"env_steps": 500}
    with pytest.raises(CommandError, match="give one of them"):
        experiment_from_file(ppo_file, options(steps=500, stop='{"updates": 1}'))


def test_missing_wandb_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(CommandError, match=r"pip install \"rllib-dreamer\[wandb\]\""):
        wandb_loggers(options(wandb_project="p"))
    assert wandb_loggers(options()) == []


def test_the_wandb_key_is_not_written_to_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    (logger,) = wandb_loggers(options(wandb_project="p", wandb_key="my-secret"))
    assert b"my-secret" not in pickle.dumps(logger)
    assert logger.kwargs["resume"] == "allow"  # else W&B empties the run that is resumed
    assert os.environ["WANDB_API_KEY"] == "my-secret"


def test_resume_refuses_a_number_of_samples(ppo_file: Path) -> None:
    given = options(resume="", num_samples=3)
    with pytest.raises(CommandError, match="--num-samples is for new runs"):
        run_experiment(experiment_from_file(ppo_file, given), given)


def test_a_cluster_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has now is checked only where Ray is this machine's."""
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    for address, variable, local in (
        (None, None, True),
        ("auto", None, False),
        (None, "10.0.0.1:6379", False),
    ):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if variable is not None:
            monkeypatch.setenv("RAY_ADDRESS", variable)
        with ray_session(address, verbose=True) as found:
            assert found is local


@pytest.mark.parametrize("given", ["--ray-address", "RAY_ADDRESS"])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://10.0.0.1:8265", "must be HOST:PORT or auto; from outside the cluster submit"),
        ("ray://10.0.0.1:10001", "must be HOST:PORT or auto"),
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("nowhere", "no Ray cluster answers there"),
    ],
)
def test_an_address_without_a_cluster_is_told_by_its_name(
    monkeypatch: pytest.MonkeyPatch, given: str, address: str, message: str
) -> None:
    def fail(**options: Any) -> None:
        assert options["address"] == address
        raise ConnectionError if ":" in address else ValueError

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setenv("RAY_ADDRESS", "other" if given == "--ray-address" else address)
    with (
        pytest.raises(CommandError, match=f"{given} {address}: {message}"),
        ray_session(address if given == "--ray-address" else None, verbose=True),
    ):
        pass


def test_checkpoint_settings() -> None:
    given = options(keep_checkpoints_num=0, checkpoint_freq=7)
    made = checkpoint_config(given, DreamerConfig())
    assert (made.num_to_keep, made.checkpoint_frequency, made.checkpoint_at_end) == (None, 7, True)
    assert checkpoint_config(options(), DreamerConfig()).num_to_keep == 2
    for seconds, frequency in ((20, 30), (7, 86), (None, 10), (0, 10)):
        config = DreamerConfig().reporting(min_time_s_per_iteration=seconds)
        assert checkpoint_config(options(), config).checkpoint_frequency == frequency
    assert checkpoint_config(options(checkpoint_freq=0), config).checkpoint_frequency == 0


def test_the_command_that_evaluates_names_the_file(ppo_file: Path, tmp_path: Path) -> None:
    """An env that the file registers is known by running it; only our checkpoints are read."""
    checkpoint = Checkpoint.from_directory(str(tmp_path))
    results: Any = [SimpleNamespace(checkpoint=checkpoint, best_checkpoints=[], metrics={})]
    cartpole = Path(__file__).parents[1] / "tuned_examples" / "cartpole.py"
    ours = experiment_from_file(cartpole, options())
    expected = f"evaluate it: rllib evaluate {tmp_path} --file {cartpole}"
    assert evaluation_hint(results, ours) == [expected]
    assert evaluation_hint(results, experiment_from_file(ppo_file, options())) == []
    assert evaluation_hint([], ours) == []  # type: ignore[arg-type]
