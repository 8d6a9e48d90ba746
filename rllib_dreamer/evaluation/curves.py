"""Learning curves of Tune runs, beside the curves published with the official code.

A *trial* is one training run (one seed) as Tune leaves it on disk: a folder with `result.json` or
`progress.csv`. A *curve* is a set of trials that differ in the seed only.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

REFERENCES = ("atari100k", "dmc_proprio", "dmc_vision")
"""Names of the published sets of curves, one CSV file each in `data/`."""

RETURN_KEY = "env_runners/episode_return_mean"
ENV_STEPS_KEY = "dreamer/env_steps"
AGENT_STEPS_KEY = "num_env_steps_sampled_lifetime"
SECONDS_KEY = "time_total_s"

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_log = logging.getLogger(__name__)
Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Trial:
    """Results of one training run; the arrays are (P,), in the order of training.

    Attributes:
        name: name of the trial's folder.
        env: name of the environment, "" if unknown.
        env_steps: agent steps times action repeat; strictly increasing.
        hours: time in training since its start, resumed parts included.
        episode_return: mean return of the latest episodes, as RLlib reports it.
    """

    name: str
    env: str
    env_steps: Floats
    hours: Floats
    episode_return: Floats


@dataclasses.dataclass(frozen=True)
class Curve:
    """Trials drawn as one line."""

    label: str
    env: str
    trials: Sequence[Trial]


class Band(NamedTuple):
    """A mean over seeds, and the lowest and highest seed; all arrays (P,).

    There is no confidence interval: runs have two to ten seeds, too few for one to hold.
    """

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


class Reference(NamedTuple):
    """A published curve: env steps (P,) and the returns (seeds, P), NaN where none was scored."""

    task: str
    env_steps: Floats
    episode_return: Floats

    def band(self) -> Band:
        """The mean over the seeds with their range.

        Scores in between are interpolated and the last one is held, so that the mean is over the
        same seeds from where each has its first score.
        """
        filled = []
        for returns in self.episode_return:
            scored = ~np.isnan(returns)
            x, y = self.env_steps[scored], returns[scored]
            filled.append(np.interp(self.env_steps, x, y, left=math.nan))
        return _band(self.env_steps, np.stack(filled))

    def mean_at(self, env_steps: float) -> float:
        """The mean over the seeds at a number of env steps, NaN where there is none."""
        line = self.band()
        return float(np.interp(env_steps, line.x, line.mean, left=math.nan, right=math.nan))


def find_trials(path: Path) -> list[Path]:
    """Finds the folders of trials at or below a path.

    Args:
        path: a trial's folder, its `result.json` or `progress.csv`, an experiment's folder, or a
            folder of experiments.

    Returns:
        The folders, sorted.

    Raises:
        ValueError: if the path does not exist or holds no results.
    """
    if not path.exists():
        raise ValueError(f"run: got {str(path)!r}, which does not exist; give a Tune folder.")
    if path.is_file():
        path = path.parent
    found = []
    for folder, children, files in os.walk(path):
        children[:] = [child for child in children if not child.startswith("checkpoint_")]
        if {"result.json", "progress.csv"} & set(files):
            found.append(Path(folder))
    if not found:
        raise ValueError(
            f"run: got {str(path)!r}, which holds no result.json or progress.csv; give the folder "
            "of a Tune experiment or trial that has reported at least once."
        )
    return sorted(found)


def read_trial(folder: Path) -> Trial:
    """Reads the results of a trial.

    `result.json` is preferred: `progress.csv` has no column for what the first result lacked, such
    as the return before the first episode ends. Where a run went on from a checkpoint, results
    that lie past that checkpoint are those of the later attempt. Results without a return are
    left out.

    Args:
        folder: a folder with `result.json` or `progress.csv`.

    Returns:
        The trial; its arrays are empty if no episode has ended yet.
    """
    source = folder / "result.json"
    if source.is_file() and source.stat().st_size:
        records = _json_records(source)
    else:
        records = _csv_records(folder / "progress.csv")
    env, env_config = _environment(folder)
    repeat: int | None = None
    rows: list[tuple[float, float, float]] = []
    for record in records:
        steps = _number(_lookup(record, ENV_STEPS_KEY))
        if math.isnan(steps):
            repeat = repeat or _action_repeat(env, env_config)
            steps = _number(_lookup(record, AGENT_STEPS_KEY)) * repeat
        hours = _number(_lookup(record, SECONDS_KEY)) / 3600.0
        row = (steps, hours, _number(_lookup(record, RETURN_KEY)))
        while rows and rows[-1][0] >= steps:  # an earlier attempt, or a result without new steps
            rows.pop()
        if all(map(math.isfinite, row)):
            rows.append(row)
    table = np.asarray(rows, np.float64).reshape(-1, 3).T  # (P, 3) -> (3, P)
    return Trial(folder.name, env, *table)


def read_curves(runs: Sequence[str]) -> list[Curve]:
    """Reads runs and groups their trials by label and environment.

    Args:
        runs: each "path" or "label=path"; the label of a bare path is the name of its folder, or
            all of the path where another has that name. Trials with the same label and environment
            are taken as seeds of one curve. Where trials below one path differ in other settings,
            those are added to the label.

    Returns:
        The curves, in the order given. Trials without a finished episode are left out.

    Raises:
        ValueError: if a path holds no results, or no trial has finished an episode.
    """
    groups: dict[tuple[str, str], dict[Path, Trial]] = {}
    for label, path in _labelled(runs):
        folders = find_trials(path)
        for folder, differences in zip(folders, _differences(folders), strict=True):
            trial = read_trial(folder)
            if trial.env_steps.size:
                key = (f"{label} {differences}".rstrip(), trial.env)
                groups.setdefault(key, {})[folder.resolve()] = trial
            else:
                _log.warning("%s has no finished episode yet: left out.", folder)
    if not groups:
        raise ValueError(
            f"run: got {list(runs)}, in which no episode has ended yet; wait for the first return."
        )
    return [Curve(label, env, list(trials.values())) for (label, env), trials in groups.items()]


def load_reference(name: str) -> dict[str, Reference]:
    """Loads the published curves of one benchmark.

    Args:
        name: one of `REFERENCES`.

    Returns:
        Task -> curve; `data/SOURCE.md` says where they come from.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in REFERENCES:
        raise ValueError(f"reference: got {name!r}; must be one of {', '.join(REFERENCES)}.")
    source = resources.files("rllib_dreamer.evaluation") / "data" / f"{name}.csv"
    tasks: dict[str, dict[tuple[int, int], float]] = {}
    for row in csv.DictReader(source.read_text(encoding="utf-8").splitlines()):
        cells = tasks.setdefault(row["task"], {})
        cells[int(row["seed"]), int(row["env_steps"])] = float(row["episode_return"])
    return {task: _reference(task, cells) for task, cells in tasks.items()}


def reference_task(env: str) -> str:
    """Names the task of an environment as the published curves do.

    Args:
        env: e.g. "dmc/walker-walk", "DMC/cup/catch", "atari100k/ms_pacman" or "ALE/MsPacman-v5".

    Returns:
        E.g. "dmc_walker_walk" or "atari_ms_pacman"; other names come back in lower case.
    """
    family, _, task = env.partition("/")
    if family == "ALE":
        game = task.split("-v")[0]
        task = "".join(f"_{c.lower()}" if c.isupper() else c for c in game).lstrip("_")
    if family.lower() == "dmc":
        from rllib_dreamer.envs.dmc import DOMAIN_ALIASES  # here: reading runs needs no envs

        for alias, domain in DOMAIN_ALIASES.items():
            task = re.sub(f"^{alias}(?=[/-])", domain, task)
    prefix = {"ale": "atari", "atari100k": "atari"}.get(family.lower(), family.lower())
    return f"{prefix}_{task.lower()}".replace("/", "_").replace("-", "_").rstrip("_")


def average(trials: Sequence[Trial], axis: str = "env_steps", points: int = 200) -> Band:
    """Averages trials on a common grid, linearly interpolated.

    The grid covers what every trial covers, so that the mean is over the same seeds everywhere.

    Args:
        trials: at least one trial, each with at least one result.
        axis: "env_steps" or "hours".
        points: number of grid points.

    Returns:
        The mean with the range of the trials; empty if they have no stretch in common.
    """
    xs = [getattr(trial, axis) for trial in trials]
    low, high = max(x[0] for x in xs), min(x[-1] for x in xs)
    if low > high:
        return Band(*np.empty((4, 0)))
    grid = np.linspace(low, high, points)
    returns = [
        np.interp(grid, x, trial.episode_return) for x, trial in zip(xs, trials, strict=True)
    ]
    return _band(grid, np.stack(returns))


def _band(x: Floats, returns: Floats) -> Band:
    """Averages returns over seeds.

    Args:
        x: (P,) positions.
        returns: (seeds, P) returns; NaN values do not count.

    Returns:
        The mean over the seeds with their range, at positions with any value.
    """
    filled = ~np.isnan(returns).all(0)  # (P,)
    values = returns[:, filled]
    return Band(x[filled], *(reduce(values, 0) for reduce in (np.nanmean, np.nanmin, np.nanmax)))


def _json_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the results of a `result.json`; a line cut short by a kill is passed over."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                _log.warning("%s, line %d: cut short, left out.", path, number)
                continue
            yield record


def _csv_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def _lookup(record: dict[str, Any], key: str) -> Any:
    """Looks up "a/b" in a flat row or in nested dicts; None if there is no such entry."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _environment(folder: Path) -> tuple[str, dict[str, Any]]:
    """A trial's environment and its config."""
    params = _params(folder)
    env, env_config = params.get("env"), params.get("env_config")
    return str(env or ""), env_config if isinstance(env_config, dict) else {}


def _differences(folders: Sequence[Path]) -> list[str]:
    """For each trial "key=value" of the settings in which they differ, but for seed and env."""
    settings = [dict(_leaves(_params(folder))) for folder in folders]
    keys = sorted(set().union(*settings) - {"seed", "env"})
    varied = [key for key in keys if len({repr(s.get(key)) for s in settings}) > 1]
    return [", ".join(f"{key}={s.get(key)}" for key in varied) for s in settings]


def _params(folder: Path) -> dict[str, Any]:
    """Reads the `params.json` beside a trial's results; empty if there is none."""
    path = folder / "params.json"
    if not path.is_file():
        return {}
    try:
        params: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        _log.warning("%s is cut short: environment and settings of this trial are unknown.", path)
        return {}
    return params


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts by name, "a/b"; Tune writes objects as text with their address."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}/{key}" if name else str(key))
    else:
        yield name, _ADDRESS.sub("", value) if isinstance(value, str) else value


def _action_repeat(env: str, env_config: dict[str, Any]) -> int:
    from rllib_dreamer.envs import action_repeat  # only for runs of other algorithms

    return action_repeat(env, env_config)


def _labelled(runs: Sequence[str]) -> list[tuple[str, Path]]:
    """The label and the path of each run; only labels that were given put paths together."""
    split = [_split_label(run) for run in runs]
    bare: dict[str, set[Path]] = {}
    for folder in (_folder(path) for label, path in split if not label):
        bare.setdefault(folder.name, set()).add(folder)

    def name(folder: Path) -> str:
        return folder.name if len(bare[folder.name]) == 1 else str(folder)

    return [(label or name(_folder(path)), path) for label, path in split]


def _folder(path: Path) -> Path:
    return (path.parent if path.is_file() else path).resolve()


def _split_label(run: str) -> tuple[str, Path]:
    """The label, "" where none is given, and the path."""
    label, equals, path = run.partition("=")
    if equals and label and not Path(run).expanduser().exists():
        return label, Path(path).expanduser()
    return "", Path(run).expanduser()


def _reference(task: str, cells: dict[tuple[int, int], float]) -> Reference:
    seeds = sorted({seed for seed, _ in cells})
    steps = sorted({step for _, step in cells})
    table = [[cells.get((seed, step), math.nan) for step in steps] for seed in seeds]
    return Reference(task, np.array(steps, np.float64), np.array(table))
