"""Going on with an experiment, also after `kill -9`.

Tune writes the state of an experiment every ten seconds or so, and copies checkpoints into
place file by file. After a kill that state may name a checkpoint which has been replaced
since, and the newest checkpoint folder may be half a copy. So each finished checkpoint gets
a mark, and before Tune resumes, the state is brought into line with the marked ones. Tune goes on
writing at the end of its tables of results, so a row that the kill cut short is taken off.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ray import cloudpickle
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.train._internal.checkpoint_manager import _CheckpointManager
from ray.train._internal.session import _TrainingResult
from ray.tune import Callback, Checkpoint, CheckpointConfig
from ray.tune.experiment import Trial
from ray.tune.utils import flatten_dict
from ray.tune.utils.serialization import TuneFunctionEncoder, _loads_with_cloudpickle

from rllib_dreamer.atomic import write_text
from rllib_dreamer.checkpoint import MARK, SCORE
from rllib_dreamer.cli.errors import CommandError, RunFailed
from rllib_dreamer.cli.folders import Mark, state_files, write_mark
from rllib_dreamer.cli.search import has_search

#: The last state that was read whole; Tune's own file may be cut short by a kill.
_BACKUP_FILE = "last_good_state.json"
_TABLES = ("result.json", "progress.csv")
_CHECKPOINT_FOLDER = re.compile(r"checkpoint_(\d+)")
#: Settings that others are written down in.
_INTERNAL = ("_scaled_settings",)
_KEPT_OF_THE_RUN = ("_session_str", "_start_time", "_total_time", "_iteration")


class Resumed(NamedTuple):
    """What was found to go on with.

    Attributes:
        trial_ids: The trials.
        iterations: The iteration each one goes on after; 0 where nothing was saved.
        changes: By setting, or entry of one, that is another now: its value before and now.
    """

    trial_ids: list[str]
    iterations: list[int]
    changes: dict[str, tuple[str, str]]


class CheckpointMarker(Callback):
    """Tune callback that marks a new experiment, and each finished checkpoint with metrics.

    Args:
        mark: What the experiment is a run of.
        trial_ids: On a resumed run, the only trials that may start: Tune begins anew,
            without an error, when it cannot read the state.
    """

    def __init__(self, mark: Mark, trial_ids: list[str] | None = None) -> None:
        self.mark, self.trial_ids = mark, trial_ids

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Marks the experiment; refuses a trial that is not one of the resumed."""
        if self.trial_ids is not None and trial.trial_id not in self.trial_ids:
            raise RunFailed("Tune could not read the experiment's state (-v shows why)")
        folder = Path(trial.storage.experiment_fs_path)
        if folder.is_dir():
            write_mark(folder, self.mark)

    def on_checkpoint(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        checkpoint: Checkpoint,
        **info: Any,
    ) -> None:
        """Marks a checkpoint as complete, and keeps a readable copy of the state."""
        flat = flatten_dict(trial.last_result or {})
        keys = ("training_iteration", "time_total_s", SCORE)
        checkpoint.update_metadata({MARK: {key: flat[key] for key in keys if key in flat}})
        folder = Path(trial.storage.experiment_fs_path)
        if folder.is_dir():
            _back_up_state(folder)


def mend_experiment(
    folder: Path,
    config: AlgorithmConfig,
    saving: CheckpointConfig,
    max_failures: int,
    *,
    keeps_limit: bool,
    start: Path | None = None,
) -> Resumed:
    """Brings the state of an experiment into line with its checkpoints and the new settings.

    Its tables of results end with a whole row then.

    Args:
        folder: The experiment.
        config: The config to go on with. Each trial keeps its seed, and what it drew where the
            value is a search.
        saving: How often to save, and how many checkpoints to keep, from now on. Those that are
            there stay until the next one is saved.
        max_failures: Restarts that each trial has from now on.
        keeps_limit: Each trial keeps as many checkpoints as before, whatever `saving` says.
        start: The checkpoint that its trial goes on from; None for the newest. Later ones stay on
            disk.

    Returns:
        The trials.

    Raises:
        CommandError: If no state can be read, it is of another algorithm or environment, or `start`
            is not complete; nothing is changed then.
    """
    if start is not None and _mark(start) is None:
        raise CommandError(
            f"--resume: {start} is not complete, or was not saved by this command; name another "
            "checkpoint, or the trial's folder to go on from its newest"
        )
    file, state = _read_state(folder)
    trials = [_trial(*trial_data) for trial_data in state["trial_data"]]
    settings = config.to_dict()
    for trial in trials:
        _check_same(trial, config, folder)
    changes = _changes(trials, settings)
    for trial in trials:
        _move_to(trial, folder)
        limit = trial.run_metadata.checkpoint_manager.checkpoint_config.num_to_keep
        own = dataclasses.replace(saving, num_to_keep=limit) if keeps_limit else saving
        _mend_checkpoints(trial, own, start)
        _mend_tables(trial)
        trial.max_failures = max_failures
        trial.run_metadata.num_failures = 0
        trial.stopping_criterion = {}
    state["trial_data"] = [_with_config(trial, settings) for trial in trials]
    # The rest is of the old run: its stop condition, its settings, decisions half carried out.
    state["runner_data"] = {key: state["runner_data"][key] for key in _KEPT_OF_THE_RUN}
    write_text(file, json.dumps(state, cls=TuneFunctionEncoder))
    ids, iterations = [trial.trial_id for trial in trials], [_iteration(trial) for trial in trials]
    return Resumed(ids, iterations, changes)


def checkpoint_at(path: str) -> Path | None:
    """The checkpoint that a path names; None if it names something else."""
    folder = Path(path).expanduser().resolve()
    return folder if _CHECKPOINT_FOLDER.fullmatch(folder.name) else None


def _trial(trial_json: str, metadata_json: str) -> Trial:
    trial = Trial.from_json_state(trial_json)
    trial.restore_run_metadata(metadata_json)
    return trial


def _check_same(trial: Trial, config: AlgorithmConfig, folder: Path) -> None:
    """Refuses a trial whose checkpoints mean nothing to the config."""
    env = config.env
    pairs = [("--run", trial.trainable_name, getattr(config.algo_class, "__name__", None))]
    if not has_search(env):
        pairs.append(("--env", _env_name(trial.config.get("env")), _env_name(env)))
    for option, before, now in pairs:
        if before and now and before != now:
            raise CommandError(
                f"--resume: {folder} was trained with {option} {before}, which cannot go on with "
                f"{now}; resume it with the former, or start a new experiment"
            )


def _env_name(env: Any) -> str | None:
    """The name of an environment; a class comes back from a file of its own as another object."""
    return env if env is None or isinstance(env, str) else getattr(env, "__qualname__", str(env))


def _changes(trials: list[Trial], config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The entries that JSON can tell and that a trial had otherwise: before and now."""
    changes = {}
    for trial in trials:
        keys = [
            key
            for key, value in config.items()
            if key in trial.config and key not in _INTERNAL and not _keeps(key, value)
        ]
        before, now = (_entries({key: x[key] for key in keys}) for x in (trial.config, config))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                changes[name] = before.get(name, "nothing"), now.get(name, "nothing")
    return changes


def _entries(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings and the entries of dicts as JSON, which Tune keeps them in; classes are left out."""
    plain = {}
    for key, value in settings.items():
        with suppress(TypeError, ValueError):
            plain[key.removeprefix("_")] = json.loads(json.dumps(value))
    return {name: json.dumps(x) for name, x in flatten_dict(plain, delimiter=".").items()}


def _keeps(key: str, value: Any) -> bool:
    """Whether a trial keeps what it had of a setting: its seed, and what a search drew."""
    return key == "seed" or has_search(value)


def _move_to(trial: Trial, folder: Path) -> None:
    """Lets a trial know where its experiment lies now."""
    storage = copy.copy(trial.storage)
    storage.storage_fs_path = str(folder.parent)
    storage.experiment_dir_name = folder.name
    trial.set_storage(storage)


def _mend_checkpoints(trial: Trial, saving: CheckpointConfig, start: Path | None) -> None:
    """Registers the complete checkpoints on disk with the trial, and removes cut-off ones.

    Those after `start` are left alone, if it is one of the trial's.
    """
    registered = trial.run_metadata.checkpoint_manager
    # Registering removes what is over the limit, so there is none until all are registered.
    manager = _CheckpointManager(dataclasses.replace(saving, num_to_keep=None))
    trial.run_metadata.checkpoint_manager = manager
    if trial.storage.trial_dir_name is not None:
        known = {
            Path(item.checkpoint.path).name: item for item in registered.best_checkpoint_results
        }
        latest = registered.latest_checkpoint_result
        if latest is not None:
            known[Path(latest.checkpoint.path).name] = latest
        found = _checkpoint_folders(Path(trial.storage.trial_fs_path))
        newest = next((index for index, path in found.items() if path == start), math.inf)
        _register(manager, {i: path for i, path in found.items() if i <= newest}, known)
        trial.storage.current_checkpoint_index = max(found, default=-1)
    manager._checkpoint_config = saving


def _register(
    manager: _CheckpointManager, found: dict[int, Path], known: dict[str, _TrainingResult]
) -> None:
    """Registers the checkpoints that have a mark or that Tune knew, and removes cut-off ones."""
    marked = {index: mark for index, path in found.items() if (mark := _mark(path)) is not None}
    for index, path in found.items():
        if index in marked:
            checkpoint = Checkpoint.from_directory(str(path))
            manager.register_checkpoint(_TrainingResult(checkpoint, marked[index]))
        elif path.name in known:
            manager.register_checkpoint(known[path.name])
        elif marked and index > max(marked):
            shutil.rmtree(path)


def _mend_tables(trial: Trial) -> None:
    """Takes off a last row without an end, to which Tune would join the next one."""
    if trial.storage.trial_dir_name is None:
        return
    for table in (Path(trial.storage.trial_fs_path) / name for name in _TABLES):
        rows = table.read_bytes() if table.is_file() else b""
        if rows and not rows.endswith(b"\n"):
            os.truncate(table, rows.rfind(b"\n") + 1)


def _with_config(trial: Trial, config: Mapping[str, Any]) -> tuple[str, str]:
    """Writes a trial as JSON with its config replaced but for its seed, kept exact by pickling."""
    old = trial.config
    new = {
        key: old[key] if key in old and _keeps(key, value) else value
        for key, value in config.items()
    }
    trial.config = {}
    trial.invalidate_json_state()
    trial_json, metadata_json = trial.get_json_state()
    fields = json.loads(trial_json)
    pickled = {"_type": "CLOUDPICKLE_FALLBACK", "value": cloudpickle.dumps(new).hex()}
    fields["config"] = fields["_Trial__unresolved_config"] = pickled
    return json.dumps(fields), metadata_json


def _iteration(trial: Trial) -> int:
    latest = trial.run_metadata.checkpoint_manager.latest_checkpoint_result
    return 0 if latest is None else int(latest.metrics.get("training_iteration", 0))


def _checkpoint_folders(trial_folder: Path) -> dict[int, Path]:
    """Lists checkpoint folders by their number, in order."""
    if not trial_folder.is_dir():
        return {}
    matches = ((_CHECKPOINT_FOLDER.fullmatch(path.name), path) for path in trial_folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _mark(checkpoint: Path) -> dict[str, Any] | None:
    """Reads the mark of a complete checkpoint, None if it has none."""
    try:
        metadata = Checkpoint.from_directory(str(checkpoint)).get_metadata()
    except ValueError:  # Cut short.
        return None
    mark = metadata.get(MARK)
    return mark if isinstance(mark, dict) else None


def _read_state(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Reads the newest state that is whole.

    Returns:
        The newest state file, which is the one that Tune will read, and the state.
    """
    newest = state_files(folder)[0]
    for file in (newest, folder / _BACKUP_FILE, *state_files(folder)[1:]):
        state = _whole_state(file)
        if state is not None:
            return newest, state
    raise CommandError(f"--resume: the state of {folder} cannot be read; start a new experiment")


def _whole_state(file: Path) -> dict[str, Any] | None:
    """Reads a state file, None if it is missing or cut short."""
    try:
        state = _loads_with_cloudpickle(file.read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and state.get("trial_data") else None


def _back_up_state(folder: Path) -> None:
    """Copies the newest state file if it is whole."""
    for file in state_files(folder)[:1]:
        if _whole_state(file) is not None:
            write_text(folder / _BACKUP_FILE, file.read_text())
