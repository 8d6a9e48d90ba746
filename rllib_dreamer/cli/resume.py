"""Going on with an experiment, also after `kill -9`.

Tune writes the state of an experiment every ten seconds or so, and copies checkpoints into
place file by file. After a kill that state may name a checkpoint which has been replaced
since, and the newest checkpoint folder may be half a copy. So each finished checkpoint gets
a mark, and before Tune resumes, the state is brought into line with the marked ones.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ray import cloudpickle
from ray.train._internal.checkpoint_manager import _CheckpointManager
from ray.train._internal.session import _TrainingResult
from ray.tune import Callback, Checkpoint, CheckpointConfig
from ray.tune.experiment import Trial
from ray.tune.utils import flatten_dict
from ray.tune.utils.serialization import TuneFunctionEncoder, _loads_with_cloudpickle

from rllib_dreamer.atomic import write_text
from rllib_dreamer.checkpoint import MARK, SCORE
from rllib_dreamer.cli.errors import CommandError, RunFailed, did_you_mean
from rllib_dreamer.cli.experiment import has_search

_STATE_FILES = "experiment_state-*.json"
#: The last state that was read whole; Tune's own file may be cut short by a kill.
_BACKUP_FILE = "last_good_state.json"
#: What the experiment is one of, see `CheckpointMarker`.
_NAME_FILE = "rllib_dreamer.txt"
_CHECKPOINT_FOLDER = re.compile(r"checkpoint_(\d+)")
_KEPT_OF_THE_RUN = ("_session_str", "_start_time", "_total_time", "_iteration")


class Resumed(NamedTuple):
    """What was found to go on with.

    Attributes:
        trial_ids: The trials.
        iterations: The iteration each one goes on after; 0 where nothing was saved.
    """

    trial_ids: list[str]
    iterations: list[int]


class CheckpointMarker(Callback):
    """Tune callback that marks the experiment with its name, each finished checkpoint with metrics.

    Args:
        name: The name of the file or algorithm, by which `--resume` finds the experiment.
        trial_ids: On a resumed run, the only trials that may start: Tune begins anew,
            without an error, when it cannot read the state.
    """

    def __init__(self, name: str, trial_ids: list[str] | None = None) -> None:
        self.name, self.trial_ids = name, trial_ids

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Marks the experiment; refuses a trial that is not one of the resumed."""
        if self.trial_ids is not None and trial.trial_id not in self.trial_ids:
            raise RunFailed("Tune could not read the experiment's state (-v shows why)")
        folder = Path(trial.storage.experiment_fs_path)
        if folder.is_dir():
            write_text(folder / _NAME_FILE, f"{self.name}\n")

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


def find_experiment(path: str, storage: Path, name: str | None, default_name: str) -> Path:
    """Finds the folder of the experiment to resume.

    Args:
        path: The value of `--resume`: an experiment, or a trial or checkpoint inside one;
            empty for the newest of this file or algorithm.
        storage: The folder of all experiments.
        name: The value of `--name`.
        default_name: The name of this file or algorithm.

    Returns:
        The experiment's folder.

    Raises:
        CommandError: If there is none.
    """
    if path:
        start = Path(path).expanduser().resolve()
        for folder in (start, *start.parents[:2]):
            if _is_experiment(folder):
                return folder
        problem = "holds no experiment" if start.is_dir() else "is no folder"
        near = did_you_mean(start.name, _names(storage))
        raise CommandError(f"--resume: {start} {problem}{near}")
    if name is not None:
        if _is_experiment(storage / name):
            return storage / name
        near = did_you_mean(name, _names(storage))
        raise CommandError(f"--resume: no experiment {name!r} in {storage}{near}")
    mine = [folder for other in _names(storage) if _is_of(folder := storage / other, default_name)]
    if not mine:
        raise CommandError(
            f"--resume: no experiment of {default_name} in {storage}; say which: --resume PATH"
        )
    return max(mine, key=lambda folder: max(file.stat().st_mtime for file in _states(folder)))


def mend_experiment(
    folder: Path, config: Mapping[str, Any], keep: CheckpointConfig, max_failures: int
) -> Resumed:
    """Brings the state of an experiment into line with its checkpoints and the new settings.

    Args:
        folder: The experiment.
        config: The config to go on with. Each trial keeps its seed, and what it drew where the
            value is a search.
        keep: How often to save, and how many checkpoints to keep, from now on.
        max_failures: Restarts that each trial has from now on.

    Returns:
        The trials.

    Raises:
        CommandError: If no state can be read.
    """
    file, state = _read_state(folder)
    trials = []
    mended = []
    for trial_json, metadata_json in state["trial_data"]:
        trial = Trial.from_json_state(trial_json)
        trial.restore_run_metadata(metadata_json)
        _move_to(trial, folder)
        _mend_checkpoints(trial, keep)
        trial.max_failures = max_failures
        trial.run_metadata.num_failures = 0
        trial.stopping_criterion = {}
        trials.append(trial)
        mended.append(_with_config(trial, config))
    state["trial_data"] = mended
    # The rest is of the old run: its stop condition, its settings, decisions half carried out.
    state["runner_data"] = {key: state["runner_data"][key] for key in _KEPT_OF_THE_RUN}
    write_text(file, json.dumps(state, cls=TuneFunctionEncoder))
    return Resumed([trial.trial_id for trial in trials], [_iteration(trial) for trial in trials])


def _move_to(trial: Trial, folder: Path) -> None:
    """Lets a trial know where its experiment lies now."""
    storage = copy.copy(trial.storage)
    storage.storage_fs_path = str(folder.parent)
    storage.experiment_dir_name = folder.name
    trial.set_storage(storage)


def _mend_checkpoints(trial: Trial, keep: CheckpointConfig) -> None:
    """Registers the complete checkpoints on disk with the trial, and removes cut-off ones."""
    registered = trial.run_metadata.checkpoint_manager
    manager = _CheckpointManager(keep)
    trial.run_metadata.checkpoint_manager = manager
    if trial.storage.trial_dir_name is None:
        return
    known = {Path(item.checkpoint.path).name: item for item in registered.best_checkpoint_results}
    latest = registered.latest_checkpoint_result
    if latest is not None:
        known[Path(latest.checkpoint.path).name] = latest
    found = _checkpoint_folders(Path(trial.storage.trial_fs_path))
    marked = {index: mark for index, path in found.items() if (mark := _mark(path)) is not None}
    for index, path in found.items():
        if index in marked:
            checkpoint = Checkpoint.from_directory(str(path))
            manager.register_checkpoint(_TrainingResult(checkpoint, marked[index]))
        elif path.name in known:
            manager.register_checkpoint(known[path.name])
        elif marked and index > max(marked):
            shutil.rmtree(path)
    trial.storage.current_checkpoint_index = max(found, default=-1)


def _with_config(trial: Trial, config: Mapping[str, Any]) -> tuple[str, str]:
    """Writes a trial as JSON with its config replaced but for its seed, kept exact by pickling."""
    old = trial.config
    new = {
        key: old[key] if key in old and (key == "seed" or has_search(value)) else value
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


def _is_experiment(folder: Path) -> bool:
    return folder.is_dir() and bool(_states(folder))


def _is_of(experiment: Path, name: str) -> bool:
    """Whether an experiment was started with this file or algorithm."""
    mark = experiment / _NAME_FILE
    return mark.is_file() and mark.read_text().strip() == name


def _names(storage: Path) -> list[str]:
    """The names of all experiments in a folder."""
    if not storage.is_dir():
        return []
    return [folder.name for folder in storage.iterdir() if _is_experiment(folder)]


def _states(folder: Path) -> list[Path]:
    """The state files of an experiment, one a session, newest first."""
    return sorted(folder.glob(_STATE_FILES), reverse=True)


def _read_state(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Reads the newest state that is whole.

    Returns:
        The newest state file, which is the one that Tune will read, and the state.
    """
    newest = _states(folder)[0]
    for file in (newest, folder / _BACKUP_FILE, *_states(folder)[1:]):
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
    for file in _states(folder)[:1]:
        if _whole_state(file) is not None:
            write_text(folder / _BACKUP_FILE, file.read_text())
