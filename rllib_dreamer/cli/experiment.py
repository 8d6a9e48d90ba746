"""From a Python file or an algorithm's name to the config of a run."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ray import cloudpickle
from ray.rllib.algorithms import registry as algorithm_registry
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune.registry import get_trainable_cls

from rllib_dreamer.cli.errors import CommandError
from rllib_dreamer.cli.options import TrainOptions
from rllib_dreamer.cli.overrides import apply_overrides, check_stop, parse_stop
from rllib_dreamer.cli.search import samples
from rllib_dreamer.cli.stopping import lookup
from rllib_dreamer.dreamer_config import DreamerConfig
from rllib_dreamer.envs import action_repeat, shares_options, validate_env_name
from rllib_dreamer.near_names import did_you_mean
from rllib_dreamer.setting_ranges import RANGES, REFUSED

DEFAULT_ALGORITHM = "DreamerTorch"
_ADVICE_OF_RLLIB = " To suppress all validation errors"  # at the end of each message


class Experiment(NamedTuple):
    """What a run needs to know.

    Attributes:
        config: The complete, checked config.
        limits: The stop condition: metric name -> limit, empty for none.
        name: A name for the experiment folder when the user gives none.
        file: The file that describes it, None without one.
    """

    config: AlgorithmConfig
    limits: dict[str, float]
    name: str
    file: Path | None = None


def experiment_from_file(path: Path, options: TrainOptions) -> Experiment:
    """Reads `config` and `stop` of a Python file; the options win over the file.

    Args:
        path: A Python file with an `AlgorithmConfig` named `config` and, if it likes, a
            dict named `stop`.
        options: The command line.

    Returns:
        The experiment.

    Raises:
        CommandError: If the file is missing, fails, has no usable `config` or `stop`, or an
            option does not fit.
    """
    module = import_file(path)
    config = getattr(module, "config", None)
    if not isinstance(config, AlgorithmConfig):
        found = "no 'config'" if config is None else f"a 'config' of type {type(config).__name__}"
        raise CommandError(
            f"{path} has {found}; it must define an AlgorithmConfig, "
            "for example config = DreamerConfig().environment('dmc/walker-walk')"
        )
    config = config.copy(copy_frozen=False)
    if options.run is not None:
        config = _with_algorithm(config, options.run)
    limits = check_stop(getattr(module, "stop", None), f"'stop' of {path}")
    return _finished(config, limits, path.stem, options)._replace(file=path)


def experiment_from_names(options: TrainOptions) -> Experiment:
    """Takes the default config of `--run` on `--env`.

    Args:
        options: The command line.

    Returns:
        The experiment.

    Raises:
        CommandError: If `--env` is missing or an option does not fit.
    """
    if options.env is None:
        raise CommandError("say which environment to train on: --env dmc/walker-walk, or a file")
    run = options.run or DEFAULT_ALGORITHM
    config = algorithm_class(run).get_default_config()
    return _finished(config, {}, f"{run}_{options.env}".replace("/", "-"), options)


def algorithm_class(name: str) -> type[Algorithm]:
    """Finds an RLlib algorithm by its name.

    Args:
        name: "DreamerTorch" or one of RLlib's own, in any case.

    Returns:
        Its class.

    Raises:
        CommandError: If there is none of that name.
    """
    known = {key.lower(): key for key in algorithm_registry.ALGORITHMS}
    if name.lower() not in known:
        near = did_you_mean(name, known.values())
        raise CommandError(f"--run: unknown algorithm {name!r}{near}")
    found: type[Algorithm] = get_trainable_cls(known[name.lower()])
    return found


def check_env(config: AlgorithmConfig) -> None:
    """Checks that the environment's name is known before anything is started.

    Args:
        config: Its `env` may be a registered name, a Gymnasium id ("package:Id-v0" too), the
            path of a class, or a class.

    Raises:
        CommandError: If `env` is missing or unknown; it names the nearest known ones.
    """
    env = config.env
    if env is None:
        raise CommandError("no environment is set; use --env NAME or config.environment('NAME')")
    if not isinstance(env, str):
        return
    try:
        validate_env_name(env)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _finished(
    config: AlgorithmConfig, limits: dict[str, float], name: str, options: TrainOptions
) -> Experiment:
    """Applies the options to a config and checks it."""
    if options.env is not None:
        if not shares_options(options.env, config.env):
            config.env_config = {}  # its keys mean nothing to another kind of env
        config.environment(env=options.env)
    if options.stop is not None and options.steps is not None:
        raise CommandError("--steps is short for a --stop: give one of them")
    if options.steps is not None:
        limits = {"env_steps": options.steps}
    if options.stop is not None:
        limits = parse_stop(options.stop)
    if options.learners is not None:
        _scale(config, options.learners, limits, options.set)
    apply_overrides(config, options.set)
    if config.algo_class is None:
        raise CommandError(
            f"'config' is a plain {type(config).__name__} which belongs to no algorithm; "
            "use DreamerConfig(), PPOConfig() or the like"
        )
    check_env(config)
    _validate(config)
    return Experiment(config, limits, name)


def _scale(
    config: AlgorithmConfig, learners: int, limits: dict[str, float], settings: list[str]
) -> None:
    """Scales a config to several learners, before the settings of `--set`, which so win."""
    if not isinstance(config, DreamerConfig):
        raise CommandError(
            f"--learners is for DreamerTorch, not for a {type(config).__name__}; "
            "write --set num_learners=... and the rest yourself"
        )
    agent_steps, env_steps = (lookup(limits, name) for name in ("agent_steps", "env_steps"))
    if agent_steps is None and env_steps is not None:
        to_be = config.copy(copy_frozen=False)
        apply_overrides(to_be, settings)
        agent_steps = env_steps / action_repeat(to_be.env, to_be.env_config)
    try:
        config.scale_to_learners(
            learners, total_steps=None if agent_steps is None else max(1, round(agent_steps))
        )
    except ValueError as error:
        raise CommandError(f"--learners {learners}: {error}") from error


def _validate(config: AlgorithmConfig) -> None:
    """Runs the config's own checks now, on samples of what a search draws."""
    for sample in samples(config):
        try:
            sample.copy(copy_frozen=False).validate()
            _check_unvalidated(sample)
        except (ValueError, TypeError, ImportError) as error:
            text = " ".join(str(error).split()).partition(_ADVICE_OF_RLLIB)[0]
            raise CommandError(f"the config is refused: {text}") from error


def _check_unvalidated(config: AlgorithmConfig) -> None:
    """Checks what no algorithm can use, and RLlib's own configs do not look at."""
    allowed, holds = RANGES["seed"]
    if not holds(config.seed):
        raise ValueError(f"`seed`={config.seed!r} must be {allowed}.")
    only, instead = REFUSED["num_gpus"]
    if config.enable_rl_module_and_learner and config.num_gpus != only:
        raise ValueError(f"`num_gpus`={config.num_gpus!r} is not used: {instead}.")


def _with_algorithm(config: AlgorithmConfig, run: str) -> AlgorithmConfig:
    """Keeps a config if it is of algorithm `run`; others cannot be translated."""
    wanted = algorithm_class(run)
    if config.algo_class is not wanted:
        name = getattr(config.algo_class, "__name__", None)
        raise CommandError(
            f"--run {run} does not fit the file, whose config belongs to {name}; "
            "leave --run away, or leave the file away and use --env"
        )
    return config


def import_file(path: Path) -> ModuleType:
    """Imports a Python file by its path, so that workers need not find it.

    Raises:
        CommandError: If it does not exist, is no Python file or fails.
    """
    if not path.is_file():
        siblings = path.parent.glob("*.py") if path.parent.is_dir() else []
        near = did_you_mean(path.name, [file.name for file in siblings])
        raise CommandError(f"no such file: {path}{near}")
    if path.suffix != ".py":
        raise CommandError(f"{path} is no Python file (its name must end in .py)")
    # A name that cannot hide an installed package ("cartpole.py", "gymnasium.py").
    name = f"rllib_train_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # What the file defines travels to the workers by value; `register_env` pickles at once.
    cloudpickle.register_pickle_by_value(module)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(f"{path}{_failure(error, path)}") from error
    return module


def _failure(error: Exception, path: Path) -> str:
    """What follows the name of a file that fails: the line, as far as it is known, and the error.

    The line is the innermost one of the file itself; of one that is no Python, that of the mistake.
    """
    frames = traceback.extract_tb(error.__traceback__)
    here = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    if isinstance(error, SyntaxError) and not here:
        return f", line {error.lineno}: {error.msg}"
    place = f", line {here[-1]}," if here else ""
    return f"{place} fails: {type(error).__name__}: {error}"
