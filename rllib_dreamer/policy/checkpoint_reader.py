"""From a path to a trained agent: finds checkpoints on disk and reads the part that acts.

A checkpoint of RLlib is a set of pickles, so reading one runs whatever code it names: read only
those that you trust. Of a checkpoint's folder the RLModule and the config are read, neither the
optimizer's state nor the replay. Ray is imported, not started.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rllib_dreamer import checkpoint
from rllib_dreamer.policy.action_units import conversion_of
from rllib_dreamer.policy.parts import PolicyParts
from rllib_dreamer.registration import ALGORITHM_NAME

logger = logging.getLogger(__name__)

DEFAULT_STORAGE = "~/ray_results"

_MODULE = Path("learner_group/learner/rl_module/default_policy")
_CONSTRUCTION = "class_and_ctor_args.pkl"
_NEWEST = ("best", "last")
_CONNECTORS = ("env_to_module_connector", "module_to_env_connector")


def find_checkpoint(
    path: str | Path, which: str = "best", storage: str | Path = DEFAULT_STORAGE
) -> Path:
    """Finds a checkpoint's folder.

    Args:
        path: A checkpoint, the folder of a Tune trial or experiment, a file in one of them, or
            "best" or "last" for that of the newest experiment in `storage`.
        which: Of several checkpoints the "best" by mean return (the last where none is known) or
            the "last". Unfinished ones do not count; the replay may be missing.
        storage: The folder of all experiments.

    Raises:
        ValueError: If there is none.
    """
    if which not in _NEWEST:
        raise ValueError(f"which: got {which!r}; must be one of {', '.join(_NEWEST)}.")
    if str(path) in _NEWEST and not Path(path).exists():
        which, folder = str(path), _newest_experiment(Path(storage).expanduser())
    else:
        folder = Path(path).expanduser()
    if "://" in str(path):
        raise ValueError(
            f"checkpoint: {path} is not on this machine; copy the folder here and give its path. "
            "Its folder `replay` may be left out."
        )
    if not folder.exists():
        raise ValueError(f"checkpoint: {folder} does not exist; give the folder of a checkpoint.")
    folder = folder.parent if folder.is_file() else folder
    if is_checkpoint(folder):
        return folder
    found = _checkpoints(folder)
    complete = [candidate for candidate in found if _is_finished(candidate)]
    if not complete:
        what = "no finished checkpoint" if found else "no checkpoint"
        raise ValueError(
            f"checkpoint: {folder} holds {what}; give the folder of a checkpoint, or of a trial "
            "or experiment that has saved one."
        )
    saved = {trial: _last_saved(trial, complete) for trial in {c.parent for c in complete}}

    def place(candidate: Path) -> tuple[float, str]:
        """Trials by time; within one by number, as a copy's times are those of the copying."""
        return saved[candidate.parent], candidate.name

    return max(complete, key=place if which == "last" else lambda c: (_score(c), *place(c)))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is that of an RLlib checkpoint, be it finished or not."""
    names = ("rllib_checkpoint.json", checkpoint.MANIFEST, "learner_group", _CONSTRUCTION)
    return any((folder / name).exists() for name in names)


def read_checkpoint(folder: Path) -> PolicyParts:
    """Reads the policy of a checkpoint, on the CPU; warns of connectors, which are no part of it.

    Raises:
        ValueError: If the checkpoint is unfinished, damaged, of another algorithm, or names code
            that is not installed.
    """
    from rllib_dreamer.dreamer_torch_rl_module import DreamerTorchRLModule

    settings = _settings(_algorithm(folder))
    checkpoint.verify(folder, hashes=False, without_replay=True)
    for name in _CONNECTORS:
        if settings.get(f"_{name}") is not None:
            logger.warning(
                "checkpoint %s was trained with `%s`, which is not run here: the policy acts on "
                "what it is given. RLlib's own `config.evaluation(...)` runs it.",
                folder,
                name,
            )
    module = _load(folder, _MODULE / _CONSTRUCTION)
    if not issubclass(module["class"], DreamerTorchRLModule):
        raise ValueError(_of_another(folder, f"has a module of type {module['class'].__name__}"))
    positional, keywords = module["ctor_args_and_kwargs"]
    built = module["class"](*positional, **keywords)
    built.set_state(_load(folder, _MODULE / "module_state.pkl"))
    ours = _load(folder, "algorithm_state.pkl")["dreamer"]
    about = {
        "checkpoint": folder.name,
        "model_size": settings.get("model_size"),
        "agent_steps": int(ours["agent_steps"]),
        "action_repeat": ours["action_repeat"],
    }
    return PolicyParts(
        built.agent.cpu(),
        keywords["observation_space"],
        keywords["action_space"],
        conversion_of(settings),
        settings.get("env"),
        dict(settings.get("env_config") or {}),
        about,
    )


def _algorithm(folder: Path) -> dict[str, Any]:
    """How the algorithm of a checkpoint was built; refuses those of another."""
    if not (folder / _CONSTRUCTION).is_file():
        checkpoint.verify(folder, hashes=False, without_replay=True)
    construction: dict[str, Any] = _load(folder, _CONSTRUCTION)
    found = construction["class"]
    if not any(base.__name__ == ALGORITHM_NAME for base in found.__mro__):
        raise ValueError(_of_another(folder, f"is of {found.__name__}"))
    return construction


def _settings(construction: dict[str, Any]) -> dict[str, Any]:
    """The config in the arguments of an algorithm, which may be an object or a dict."""
    positional, keywords = construction["ctor_args_and_kwargs"]
    config = positional[0] if positional else keywords["config"]
    settings: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    return settings


def _of_another(folder: Path, what: str) -> str:
    return f"checkpoint {folder} {what}, not of {ALGORITHM_NAME}: give one that the latter saved."


def _load(folder: Path, name: str | Path) -> Any:
    """Unpickles one file of a checkpoint."""
    try:
        with (folder / name).open("rb") as file:
            return pickle.load(file)
    except ImportError as error:
        raise ValueError(
            f"checkpoint {folder} needs the module {error.name!r}, which cannot be imported: "
            "install it, or put its folder on PYTHONPATH."
        ) from error
    except AttributeError as error:
        raise ValueError(
            f"checkpoint {folder} needs code that has another name or place now ({error}): give "
            "it the old name too, or install the version that wrote the checkpoint."
        ) from error
    except (FileNotFoundError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"checkpoint {folder} is not complete: {name} is missing or damaged. Use an earlier "
            "one."
        ) from error


def _newest_experiment(storage: Path) -> Path:
    """The experiment in which something was saved last."""
    experiments = [path for path in storage.iterdir() if path.is_dir()] if storage.is_dir() else []
    found = {path: list(filter(_is_finished, _checkpoints(path))) for path in experiments}
    saved = {path: _last_saved(path, complete) for path, complete in found.items() if complete}
    if not saved:
        raise ValueError(
            f"checkpoint: no experiment in {storage} has a finished checkpoint; give a path, or "
            "the folder of your experiments (--storage-path)."
        )
    return max(saved, key=lambda path: saved[path])


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a trial's or an experiment's folder."""
    return [c for pattern in ("checkpoint_*", "*/checkpoint_*") for c in folder.glob(pattern)]


def _is_finished(folder: Path) -> bool:
    """Whether a checkpoint was saved to its end, with its replay there or taken away."""
    return checkpoint.is_complete(folder, without_replay=True)


def _last_saved(folder: Path, checkpoints: list[Path]) -> float:
    """When the newest of the checkpoints below a folder was finished."""
    times = [(c / checkpoint.MANIFEST).stat().st_mtime for c in checkpoints if folder in c.parents]
    return max(times)


def _score(folder: Path) -> float:
    """Mean return at which a checkpoint was saved, -inf if unknown."""
    score = next((s for s in _scores(folder) if not math.isnan(s)), -math.inf)
    return score


def _scores(folder: Path) -> Iterator[float]:
    """What is known of a checkpoint's mean return: its own mark, then the trial's results."""
    for metadata in _records(folder / ".metadata.json", checkpoint.MARK):
        yield float(metadata.get(checkpoint.MARK, {}).get(checkpoint.SCORE, math.nan))
    for result in _records(folder.parent / "result.json", folder.name):
        if result.get("checkpoint_dir_name") == folder.name:
            yield float(result.get("env_runners", {}).get("episode_return_mean", math.nan))


def _records(path: Path, word: str) -> Iterator[dict[str, Any]]:
    """The JSON objects, one a line, that hold a word; what a kill cut short is passed over."""
    for line in path.read_text().splitlines() if path.is_file() else []:
        if word in line:
            with suppress(json.JSONDecodeError):
                yield json.loads(line)
