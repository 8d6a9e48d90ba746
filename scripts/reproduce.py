"""Runs experiments from scratch to their rows in docs/results.md.

make reproduce EXPERIMENT=cartpole

An interrupted experiment goes on from its last checkpoint when the command is given again, and
what is finished is not run again. Checkpoints and videos stay in runs/, which git ignores; curves,
summary and picture go to results/.
"""

from __future__ import annotations

import ast
import hashlib
import json
from fnmatch import filter as matching
from pathlib import Path
from typing import Annotated

import torch
import typer
from experiments import EPISODES, EVALUATION_SEED, EXPERIMENTS, Experiment
from filelock import FileLock
from reproduce_results import Results
from reproduce_runs import ROOT, SeedRun, write_json


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="EXPERIMENT...", help="Names or patterns; none lists them."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where checkpoints go.")] = ROOT / "runs",
    results: Annotated[Path, typer.Option(help="Where curves go.")] = ROOT / "results",
    page: Annotated[Path, typer.Option(help="Page with the table.")] = ROOT / "docs/results.md",
    seed: Annotated[int | None, typer.Option(help="Run only this one of the seeds.")] = None,
) -> None:
    """Train, evaluate, draw and tabulate experiments; go on with interrupted ones."""
    if not names:
        typer.echo("\n".join(f"{name:30} {e.protocol}" for name, e in EXPERIMENTS.items()))
        return
    try:
        for name in chosen(names):
            where = runs.resolve() / name
            run_experiment(name, EXPERIMENTS[name], where, Results(results, page), seed)
    except (ValueError, RuntimeError) as error:
        typer.echo(f"reproduce: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, RuntimeError) else 2) from error
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None


def chosen(patterns: list[str]) -> list[str]:
    """The experiments that any of the patterns matches, in the order of the patterns.

    Raises:
        ValueError: If a pattern matches none.
    """
    found = {pattern: matching(EXPERIMENTS, pattern) for pattern in patterns}
    for pattern, names in found.items():
        if not names:
            raise ValueError(
                f"EXPERIMENT={pattern} matches none of {', '.join(EXPERIMENTS)}: choose one."
            )
    return list(dict.fromkeys(name for names in found.values() for name in names))


def run_experiment(
    name: str, experiment: Experiment, folder: Path, results: Results, only: int | None = None
) -> None:
    """Runs what is missing of an experiment, and writes its results after every evaluation.

    All seeds reach a stop before the first goes on to the next.

    Args:
        name: The experiment's name.
        experiment: The experiment.
        folder: Where its runs go.
        results: Where its results go.
        only: The one seed to run; what others have reached is in the results all the same.

    Raises:
        ValueError: If it cannot run here, was begun with other settings or has no such seed.
        RuntimeError: If a training or an evaluation fails.
    """
    if experiment.cuda and not torch.cuda.is_available():
        raise ValueError(f"{name} needs a CUDA device, PyTorch sees none: run it where there is.")
    if only not in (None, *experiment.seeds):
        raise ValueError(f"--seed {only} is not one of {name}: choose from {experiment.seeds}.")
    check_unchanged(name, experiment, folder / "experiment.json")
    seeds = [SeedRun(experiment, seed, folder) for seed in experiment.seeds]
    for stop, limits in enumerate(experiment.stops):
        for run in seeds:
            if only in (None, run.seed):
                typer.echo(f"{name}, seed {run.seed}, until {limits}")
                run.train(stop)
                run.evaluate(stop)
                with FileLock(folder.parent / "results.lock"):  # other seeds may train beside it
                    results.write(name, experiment, seeds)


def check_unchanged(name: str, experiment: Experiment, record: Path) -> None:
    """Keeps the settings of an experiment with its runs, or compares them with those kept.

    Raises:
        ValueError: If the experiment was begun with other settings.
    """
    values = experiment._asdict() | {"episodes": EPISODES, "evaluation_seed": EVALUATION_SEED}
    values |= {"code of file": code_digest(ROOT / experiment.file)}
    now = json.loads(json.dumps(values))
    if record.is_file():
        begun = json.loads(record.read_text())
        if begun != now:
            names = sorted(k for k in begun.keys() | now.keys() if begun.get(k) != now.get(k))
            raise ValueError(
                f"{name} was begun with other settings ({', '.join(names)}): give the changed "
                f"experiment a new name, or remove {record.parent} to begin anew."
            )
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, now)


def code_digest(file: Path) -> str:
    """What changes with the code of a Python file, and not with its docstring and comments."""
    module = ast.parse(file.read_text())
    body = module.body[1:] if ast.get_docstring(module) is not None else module.body
    return hashlib.sha256("\n".join(map(ast.dump, body)).encode()).hexdigest()


if __name__ == "__main__":
    typer.run(main)
