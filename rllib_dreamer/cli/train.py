"""`rllib train file FILE.py` and `rllib train --run NAME --env NAME`."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from ray import tune
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune import Callback, CheckpointConfig, FailureConfig, ResumeConfig, RunConfig, TuneConfig
from ray.tune.registry import register_trainable
from ray.tune.result import EXPR_ERROR_FILE
from ray.tune.result_grid import ResultGrid
from rich.console import Console

from rllib_dreamer.checkpoint import SCORE
from rllib_dreamer.cli.errors import CommandError, RunFailed, first_line
from rllib_dreamer.cli.experiment import (
    Experiment,
    experiment_from_file,
    experiment_from_names,
)
from rllib_dreamer.cli.folders import (
    Mark,
    find_experiments,
    holding,
    is_experiment,
    make_dated_folder,
    make_folder,
)
from rllib_dreamer.cli.options import TrainOptions, takes_train_options
from rllib_dreamer.cli.progress import ProgressDisplay
from rllib_dreamer.cli.reporter import RunReporter
from rllib_dreamer.cli.resume import CheckpointMarker, checkpoint_at, mend_experiment
from rllib_dreamer.cli.search import samples
from rllib_dreamer.cli.session import lacking_resources, prepare, ray_session
from rllib_dreamer.cli.stopping import StopCondition, StoppableScheduler, stop_on_signal
from rllib_dreamer.cli.summary import closing_lines, evaluation_hint
from rllib_dreamer.policy.checkpoint_reader import DEFAULT_STORAGE

#: Seconds between two checkpoints where `--checkpoint-freq` does not say.
CHECKPOINT_PERIOD = 600.0
#: Best checkpoints that a new experiment keeps where `--keep-checkpoints-num` does not say.
KEPT_CHECKPOINTS = 2

train_app = typer.Typer(invoke_without_command=True, help="Train an algorithm.")


@train_app.callback()
@takes_train_options
def train(context: typer.Context, options: TrainOptions) -> None:
    """Train an algorithm on an environment, or what a Python FILE describes.

    Example: rllib train --run DreamerTorch --env dmc/walker-walk --stop '{"env_steps": 500000}'
    """
    if context.invoked_subcommand is not None:
        if options != TrainOptions():
            raise CommandError("put the options behind the file: rllib train file FILE.py ...")
        return
    prepare(options.verbose)
    run_experiment(experiment_from_names(options), options)


@train_app.command("file")
@takes_train_options
def train_file(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", show_default=False)],
    options: TrainOptions,
) -> None:
    """Train what a Python file describes: its `config`, until its `stop`.

    Example: rllib train file tuned_examples/walker.py --set training_ratio=256
    """
    prepare(options.verbose)
    run_experiment(experiment_from_file(file, options), options)


def run_experiment(experiment: Experiment, options: TrainOptions) -> None:
    """Runs an experiment to its end and prints where the checkpoints are.

    Args:
        experiment: What to run.
        options: The command line.

    Raises:
        CommandError: If an option does not fit.
        RunFailed: If a trial failed for good.
        typer.Exit: With 130 if Ctrl-C ended the run.
    """
    if options.resume_or_start:
        options = _resume_or_start(options)
    if options.resume is not None and options.num_samples != 1:
        raise CommandError("--num-samples is for new runs; with --resume leave it away")
    loggers = wandb_loggers(options)
    with holding(_folders(experiment, options)) as folder:
        _run_in(folder, experiment, options, loggers)


def _run_in(
    folder: Path, experiment: Experiment, options: TrainOptions, loggers: list[Callback]
) -> None:
    """Runs an experiment in a folder that is its own."""
    console = Console()
    config = experiment.config
    reporters = config.callbacks_class
    reporters = list(reporters) if isinstance(reporters, (list, tuple)) else [reporters]
    config.callbacks(callbacks_class=[*reporters, RunReporter])
    condition = StopCondition(experiment.limits)
    display = ProgressDisplay(console, experiment.limits)

    modules = None if experiment.file is None else experiment.file.resolve().parent
    with ray_session(options.ray_address, options.verbose, modules) as local:
        lacks = next(filter(None, map(lacking_resources, samples(config))), None)
        if lacks and local:
            raise CommandError(lacks)
        _announce(console, experiment, folder)
        if lacks:
            _print(console, f"waiting for the cluster to grow: {lacks}")
        with stop_on_signal(condition, lambda: _say_stopping(console)):
            try:
                results = _run(experiment, options, folder, condition, [display, *loggers])
            finally:
                display.close()
    lines = [*closing_lines(results), *evaluation_hint(results, experiment)]
    _print(console, *lines)
    _raise_errors(results, folder, options.verbose)
    if condition.requested:
        raise typer.Exit(130)


def checkpoint_config(options: TrainOptions, config: AlgorithmConfig) -> CheckpointConfig:
    """Says which checkpoints Tune keeps: the best by mean return, besides the last one."""
    frequency, kept = options.checkpoint_freq, options.keep_checkpoints_num
    return CheckpointConfig(
        num_to_keep=(KEPT_CHECKPOINTS if kept is None else kept) or None,
        checkpoint_score_attribute=SCORE,
        checkpoint_score_order="max",
        checkpoint_frequency=default_checkpoint_freq(config) if frequency is None else frequency,
        checkpoint_at_end=options.checkpoint_at_end,
    )


def default_checkpoint_freq(config: AlgorithmConfig) -> int:
    """Iterations between checkpoints, which hold the replay: ten minutes, or 10 iterations."""
    seconds = config.min_time_s_per_iteration
    return math.ceil(CHECKPOINT_PERIOD / seconds) if seconds else 10


def wandb_loggers(options: TrainOptions) -> list[Callback]:
    """Makes the Weights & Biases logger if any `--wandb-...` option is given.

    Args:
        options: The command line.

    Returns:
        One logger or none.

    Raises:
        CommandError: If the package is missing, or the project's name.
    """
    if not (options.wandb_key or options.wandb_project or options.wandb_run_name):
        return []
    if not options.wandb_project:
        raise CommandError("--wandb-project is missing: W&B needs the project to log to")
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise CommandError(
            'W&B is not installed; type: pip install "rllib-dreamer[wandb]"'
        ) from error
    from rllib_dreamer.evaluation.wandb_logger import VideoWandbLogger

    if options.wandb_key:  # not as an argument: Tune writes those into the experiment's folder
        os.environ["WANDB_API_KEY"] = options.wandb_key
    extra: dict[str, Any] = {"name": options.wandb_run_name} if options.wandb_run_name else {}
    # A resumed trial has the id that it had: without `resume` W&B would begin its run anew.
    return [VideoWandbLogger(project=options.wandb_project, resume="allow", **extra)]


def _folders(experiment: Experiment, options: TrainOptions) -> list[Path]:
    """The experiment's folder, made here if it is new; those that may be meant to be resumed."""
    storage = _storage(options.storage_path or DEFAULT_STORAGE)
    if options.resume is not None:
        return find_experiments(options.resume, storage, options.name, _mark(experiment))
    if options.name:
        return [make_folder(storage, options.name)]
    try:
        return [make_dated_folder(storage, f"{experiment.name}_")]
    except OSError as error:
        raise CommandError(f"--storage-path: {error.filename}: {error.strerror}") from error


def _resume_or_start(options: TrainOptions) -> TrainOptions:
    """Turns --resume-or-start into --resume or a new run, by whether the experiment exists."""
    if not options.name or options.resume is not None:
        raise CommandError("--resume-or-start: needs --name NAME, and no --resume beside it")
    if not is_experiment(_storage(options.storage_path or DEFAULT_STORAGE) / options.name):
        return options
    return dataclasses.replace(options, resume="", num_samples=1)  # it knows its trials


def _mark(experiment: Experiment) -> Mark:
    """What marks this run; of a file that `ray job submit` sent, whose folder varies, the name."""
    file = experiment.file and experiment.file.resolve()
    sent = file is not None and any(part.startswith("_ray_pkg_") for part in file.parts)
    return Mark(experiment.name, None if sent else file)


def _storage(given: str) -> Path:
    """The folder of all experiments, made if need be."""
    if "://" in given:
        raise CommandError(f"--storage-path: got {given}; must be a local or mounted folder")
    storage = Path(given).expanduser().resolve()
    try:
        storage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--storage-path: {storage}: {error.strerror}") from error
    return storage


def spread_seeds(config: AlgorithmConfig, samples: int) -> int:
    """Gives several runs of a setting the config's seed and those after it.

    Args:
        config: Changed in place, unless it has no seed or a search of its own for it.
        samples: How many runs.

    Returns:
        How often Tune has to sample the config.
    """
    if samples == 1 or not isinstance(config.seed, int):
        return samples
    config.seed = tune.grid_search([config.seed + number for number in range(samples)])
    return 1


def _run(
    experiment: Experiment,
    options: TrainOptions,
    folder: Path,
    condition: StopCondition,
    callbacks: list[Callback],
) -> ResultGrid:
    """Hands the experiment to Tune."""
    if options.resume is not None:
        return _resume(experiment, options, folder, condition, callbacks)
    rounds = spread_seeds(experiment.config, options.num_samples)
    tuner = tune.Tuner(
        experiment.config.algo_class,
        param_space=experiment.config,
        tune_config=TuneConfig(num_samples=rounds, scheduler=StoppableScheduler(condition)),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            stop=condition,
            callbacks=[*callbacks, CheckpointMarker(_mark(experiment))],
            checkpoint_config=checkpoint_config(options, experiment.config),
            failure_config=FailureConfig(max_failures=options.max_failures),
            verbose=0,
        ),
    )
    return tuner.fit()


def _resume(
    experiment: Experiment,
    options: TrainOptions,
    folder: Path,
    condition: StopCondition,
    callbacks: list[Callback],
) -> ResultGrid:
    """Goes on from the checkpoint named, else from the newest complete one of each trial."""
    algorithm = experiment.config.algo_class
    assert algorithm is not None and options.resume is not None
    register_trainable(algorithm.__name__, algorithm)
    saving = checkpoint_config(options, experiment.config)
    resumed = mend_experiment(
        folder,
        experiment.config,
        saving,
        options.max_failures,
        keeps_limit=options.keep_checkpoints_num is None,
        start=checkpoint_at(options.resume),
    )
    steps = ", ".join(f"iteration {number}" for number in resumed.iterations)
    changes = [f"{key} {before} -> {now}" for key, (before, now) in resumed.changes.items()]
    told = [f"changed since: {', '.join(changes)}"] if changes else []
    print(f"resuming after {steps}", *told, sep="\n", flush=True)
    kind = ResumeConfig.ResumeType.RESUME
    analysis = tune.run(
        algorithm,
        name=folder.name,
        storage_path=str(folder.parent),
        stop=condition,
        scheduler=StoppableScheduler(condition),
        callbacks=[*callbacks, CheckpointMarker(_mark(experiment), resumed.trial_ids)],
        checkpoint_config=saving,
        max_failures=options.max_failures,
        resume_config=ResumeConfig(finished=kind, unfinished=kind, errored=kind),
        raise_on_failed_trial=False,
        verbose=0,
    )
    return ResultGrid(analysis)


def _announce(console: Console, experiment: Experiment, folder: Path) -> None:
    """Says what runs, until when, and where it is written."""
    config = experiment.config
    name = getattr(config.algo_class, "__name__", "algorithm")
    limits = " or ".join(f"{key} >= {limit:,}" for key, limit in experiment.limits.items())
    until = f"until {limits}" if limits else "until Ctrl-C (no stop condition given)"
    env = config.env if isinstance(config.env, str) else getattr(config.env, "__name__", "env")
    if config.env_config:
        env += " (" + ", ".join(f"{key} {value}" for key, value in config.env_config.items()) + ")"
    _print(console, f"{name} on {env}, {until}", f"written to {folder}")


def _print(console: Console, *lines: str) -> None:
    """Prints lines as they are."""
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _say_stopping(console: Console) -> None:
    console.print("stopping after the current iteration, with a checkpoint; Ctrl-C again aborts")


def _raise_errors(results: ResultGrid, folder: Path, verbose: bool) -> None:
    """Turns failed trials into one line, with where they tell more and what brings them back."""
    errors = [error for error in results.errors if error is not None]
    if not errors:
        return
    if verbose:
        print(*errors, sep="\n", file=sys.stderr)
    count = f" ({len(errors)} of {len(results)} trials failed)" if len(results) > 1 else ""
    saved = any(result.checkpoint is not None for result in results)
    resume = f"; add --resume {folder} to go on from the last checkpoint" if saved else ""
    text = (
        f"the run failed: {first_line(errors[0]).rstrip('.')}{count}{_traceback(results)}{resume}"
    )
    raise RunFailed(text)


def _traceback(results: ResultGrid) -> str:
    """Where the traceback of the first failed trial is."""
    failed = next(result for result in results if result.error is not None)
    file = Path(failed.path) / EXPR_ERROR_FILE
    return f"; the traceback is in {file}" if file.is_file() else ""
