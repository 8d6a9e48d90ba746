"""The options which `rllib train file` and `rllib train` share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

_RUN = "Run"
_SAVE = "Checkpoints"
_LINKS = "Cluster and logging"


@dataclass(frozen=True)
class TrainOptions:
    """What can be said on the command line about a run; one field, one option."""

    env: Annotated[
        str | None, typer.Option("--env", "-e", help="Environment name.", rich_help_panel=_RUN)
    ] = None
    run: Annotated[
        str | None,
        typer.Option("--run", help="Algorithm, DreamerTorch by default.", rich_help_panel=_RUN),
    ] = None
    stop: Annotated[
        str | None,
        typer.Option(
            "--stop",
            "-s",
            help="""JSON, for example '{"env_steps": 500000}'.""",
            rich_help_panel=_RUN,
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            help="""Env steps at which to stop, short for --stop '{"env_steps": N}'.""",
            rich_help_panel=_RUN,
        ),
    ] = None
    set: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            rich_help_panel=_RUN,
            help="Set a config field; dots reach into dicts: env_config.action_repeat=4.",
        ),
    ] = field(default_factory=list)
    learners: Annotated[
        int | None,
        typer.Option(
            "--learners",
            min=1,
            rich_help_panel=_RUN,
            help="Learners; batch, environments and learning rates are scaled with them.",
        ),
    ] = None
    num_samples: Annotated[
        int,
        typer.Option(
            "--num-samples",
            min=1,
            help="Runs per setting, with a seed each if the config has one.",
            rich_help_panel=_RUN,
        ),
    ] = 1
    max_failures: Annotated[
        int,
        typer.Option(
            "--max-failures",
            min=-1,
            rich_help_panel=_RUN,
            help="Restarts of a failed trial from its last checkpoint; -1 for ever.",
        ),
    ] = 0
    name: Annotated[
        str | None, typer.Option("--name", help="Experiment folder.", rich_help_panel=_SAVE)
    ] = None
    storage_path: Annotated[
        str | None,
        typer.Option(
            "--storage-path", help="Where experiments lie [~/ray_results].", rich_help_panel=_SAVE
        ),
    ] = None
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[PATH]",
            rich_help_panel=_SAVE,
            help="Go on with an experiment; without PATH the newest one (of --name).",
        ),
    ] = None
    resume_or_start: Annotated[
        bool,
        typer.Option(
            "--resume-or-start",
            rich_help_panel=_SAVE,
            help="Go on with --name NAME, or begin it; for schedulers that repeat a command.",
        ),
    ] = False
    checkpoint_freq: Annotated[
        int | None,
        typer.Option(
            "--checkpoint-freq",
            min=0,
            help="Iterations between checkpoints, 0 for none; about ten minutes by default.",
            rich_help_panel=_SAVE,
        ),
    ] = None
    checkpoint_at_end: Annotated[
        bool,
        typer.Option(
            "--checkpoint-at-end/--no-checkpoint-at-end",
            help="Save when a trial ends.",
            rich_help_panel=_SAVE,
        ),
    ] = True
    keep_checkpoints_num: Annotated[
        int | None,
        typer.Option(
            "--keep-checkpoints-num",
            min=0,
            rich_help_panel=_SAVE,
            help="Best checkpoints to keep, besides the last one; 0 for all. [2, or as before]",
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            help="A running Ray cluster [RAY_ADDRESS, else Ray is started here].",
            rich_help_panel=_LINKS,
        ),
    ] = None
    wandb_key: Annotated[
        str | None,
        typer.Option(
            "--wandb-key",
            help="Weights & Biases API key [WANDB_API_KEY].",
            rich_help_panel=_LINKS,
        ),
    ] = None
    wandb_project: Annotated[
        str | None,
        typer.Option("--wandb-project", help="Log to this W&B project.", rich_help_panel=_LINKS),
    ] = None
    wandb_run_name: Annotated[
        str | None,
        typer.Option("--wandb-run-name", help="Name of the W&B run.", rich_help_panel=_LINKS),
    ] = None
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show Ray's messages and tracebacks."),
    ] = False


def takes_train_options(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a Typer command one option per field of `TrainOptions`.

    Args:
        function: A command whose last parameter is `options: TrainOptions`.

    Returns:
        The command with the fields as keyword parameters in place of `options`.
    """
    hints = get_type_hints(TrainOptions, include_extras=True)
    fields = dataclasses.fields(TrainOptions)

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        values = {item.name: kwargs.pop(item.name) for item in fields}
        values["set"] = list(values["set"] or [])
        function(*args, options=TrainOptions(**values), **kwargs)

    own_hints = get_type_hints(function, include_extras=True)
    own = [
        parameter.replace(annotation=own_hints[name])
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "options"
    ]
    shared = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[item.name],
            default=None if item.default is dataclasses.MISSING else item.default,
        )
        for item in fields
    ]
    signature = inspect.Signature([*own, *shared])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    return command
