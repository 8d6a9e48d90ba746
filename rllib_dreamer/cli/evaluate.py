"""The `rllib evaluate` sub-command."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rllib_dreamer.cli.errors import CommandError, RunFailed
from rllib_dreamer.cli.experiment import import_file
from rllib_dreamer.cli.folders import make_dated_folder
from rllib_dreamer.cli.session import prepare
from rllib_dreamer.envs import family_of, register_envs, shares_options, validate_env_name
from rllib_dreamer.evaluation.episodes import Rules
from rllib_dreamer.evaluation.run import Evaluation, evaluate, write_results
from rllib_dreamer.policy.checkpoint_reader import DEFAULT_STORAGE, find_checkpoint
from rllib_dreamer.policy.export import is_exported
from rllib_dreamer.policy.policy import DreamerPolicy

#: Agent steps, of all environments together, without the end of an episode that look like no end.
LONG_EPISODES = 40_000


def evaluate_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            show_default=False,
            help="A checkpoint, the folder of a trial or experiment, an exported policy, or "
            "best or last of the newest experiment.",
        ),
    ],
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes to play.")] = 20,
    save_dir: Annotated[
        Path | None, typer.Option(help="Where the results go; evaluations/DATE_TIME by default.")
    ] = None,
    env: Annotated[
        str | None, typer.Option("--env", "-e", help="Environment; that of the training if unset.")
    ] = None,
    env_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="Changes keys of the training's env_config.")
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample actions.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Episode k is reset with seed + k.")] = 0,
    num_envs: Annotated[
        int | None, typer.Option(min=1, help="Environments side by side, 4 by default.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Agent steps after which an episode is cut off.")
    ] = None,
    which: Annotated[
        str, typer.Option(help="Of several checkpoints in a folder: best (by return) or last.")
    ] = "best",
    file: Annotated[
        Path | None, typer.Option(help="Python file that registers the environment.")
    ] = None,
    storage_path: Annotated[str, typer.Option(help="Where experiments lie.")] = DEFAULT_STORAGE,
    device: Annotated[str, typer.Option(help="Where the policy computes: cpu, cuda.")] = "cpu",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks.")] = False,
) -> None:
    """Play episodes with a trained policy; report returns, the world model and videos.

    Example: rllib evaluate best --episodes 20 --save-dir evaluation/
    """
    prepare(verbose)
    console = Console()
    rules = Rules(greedy=not sample, seed=seed, max_steps=max_steps)
    changes = parse_env_config(env_config)
    if file is not None:
        import_file(file)  # for what it registers
    check_device(device)
    with _errors_in_one_line():
        policy = _load(checkpoint, which, storage_path, device, console)
        source, config = environment(policy, env, changes)
        if file is None:
            _require_known(source)
        folder = _make(save_dir)
        evaluation = _play(policy, source, config, console, episodes, num_envs, rules)
        _show(console, *summary_lines(evaluation))  # first: the disk may be full
        _show(console, *map(str, write_results(evaluation, folder)))


def check_device(device: str) -> None:
    """Refuses a device that PyTorch does not know or cannot use.

    Raises:
        CommandError: Naming the reason.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch without CUDA
        reason = str(error).partition("\n")[0]
        raise CommandError(f"--device: got {device!r}; must be cpu or cuda ({reason})") from error


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Tells wrong values as wrong usage, and what fails on the way as a failed run."""
    try:
        yield
    except ValueError as error:
        raise CommandError(" ".join(str(error).split())) from error
    except (RuntimeError, OSError) as error:  # of an env (see `CheckedEnv`), or of files
        raise RunFailed(" ".join(str(error).split())) from error


def _make(folder: Path | None) -> Path:
    """Makes the folder of the results, before anything is played; by default a new one."""
    try:
        if folder is None:
            return make_dated_folder(Path("evaluations"))
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder  # as it can be written to
    except OSError as error:
        raise CommandError(f"--save-dir: {folder}: {error.strerror}") from error


def parse_env_config(text: str | None) -> dict[str, Any]:
    """Reads `--env-config`.

    Raises:
        CommandError: If it is no JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise CommandError(f"--env-config: {error.msg} in {text!r}; it takes JSON") from error
    if not isinstance(found, dict):
        raise CommandError(f"""--env-config: got {text!r}; must be like '{{"action_repeat": 4}}'""")
    return found


def summary_lines(evaluation: Evaluation) -> list[str]:
    """What the screen shows at the end."""
    returns, lengths = evaluation.summary
    mean, std, median, low, high, iqm, iqm_low, iqm_high = (
        f"{value:.{returns.decimals}f}" for value in returns[1:]
    )
    lines = [
        f"return      {mean} ± {std}, median {median}, {low} to {high}",
        f"IQM         {iqm}, 95 % interval {iqm_low} to {iqm_high}",
        f"length      {lengths.mean:.1f} agent steps, {lengths.mean * evaluation.repeat:.1f} env "
        "steps",
    ]
    if evaluation.success_rate is not None:
        lines.append(f"success     {100 * evaluation.success_rate:.1f} % of episodes")
    for key, quality in evaluation.world.images.items():
        ssim, psnr = (x.mean() for x in quality.posterior)
        lines.append(f"posterior   {key}: SSIM {ssim:.3f}, PSNR {psnr:.1f} dB")
        if quality.open_loop is not None:
            ahead = quality.open_loop.ahead
            means = ahead.overall()
            lines.append(
                f"open loop   {key}: SSIM {means['ssim']:.3f}, PSNR {means['psnr']:.1f} dB "
                f"over {ahead.step[-1]} steps"
            )
    return lines


def _show(console: Console, *lines: str) -> None:
    """Prints lines as they are."""
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _load(
    checkpoint: str, which: str, storage: str, device: str, console: Console
) -> DreamerPolicy:
    """Loads the policy and says from where."""
    path = Path(checkpoint).expanduser()
    folder = path if is_exported(path) else find_checkpoint(checkpoint, which, storage)
    _show(console, f"evaluating {folder}")
    return DreamerPolicy.from_checkpoint(folder, device=device)


def environment(
    policy: DreamerPolicy, env: str | None, changes: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The environment to play in, and its config: that of the training within its family."""
    trained = policy.env
    if env is None and trained is None:
        raise CommandError("the policy does not say where it was trained; use --env NAME")
    config = policy.env_config if env is None or shares_options(env, trained) else {}
    return env or trained, {**config, **changes}


def _require_known(env: Any) -> None:
    """Refuses a name that is not known without the training's file."""
    if not isinstance(env, str) or family_of(env) is not None:
        return
    register_envs()
    try:
        validate_env_name(env)
    except ValueError as error:
        text = f"{error} If the training's file registers it, add --file FILE.py"
        raise CommandError(text) from error


def _play(
    policy: DreamerPolicy,
    env: Any,
    env_config: dict[str, Any],
    console: Console,
    episodes: int,
    num_envs: int | None,
    rules: Rules,
) -> Evaluation:
    """Evaluates with a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes, {task.fields[steps]:,} agent steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("playing", total=episodes, steps=0)

        def show(done: int, steps: int) -> None:
            what = "playing" if done < episodes else "measuring"
            bar.update(task, completed=done, steps=steps, description=what)
            if done == 0 and steps == LONG_EPISODES:
                _show(bar.console, "no episode has ended yet: --max-steps N would cut them off")

        return evaluate(
            policy,
            env,
            env_config,
            episodes=episodes,
            num_envs=num_envs,
            rules=rules,
            on_progress=show,
        )
