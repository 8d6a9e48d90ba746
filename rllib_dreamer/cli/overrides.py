"""`--set key=value` and `--stop JSON`: text from the command line to typed settings."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping
from numbers import Number, Real
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rllib_dreamer.cli.errors import CommandError
from rllib_dreamer.cli.stopping import STOP_ALIASES
from rllib_dreamer.near_names import did_you_mean

#: Spellings that people use, and the attribute which RLlib keeps the value under.
FIELD_ALIASES = {
    "callbacks": "callbacks_class",
    "framework": "framework_str",
    "input": "input_",
    "lambda": "lambda_",
    "model_config": "_model_config",
    "num_workers": "num_env_runners",
    "num_envs_per_worker": "num_envs_per_env_runner",
}

#: Fields of which a class may be given by name or path, to RLlib or to its registry.
_TAKES_A_PATH = ("callbacks", "callbacks_class", "env")


def parse_value(text: str) -> Any:
    """Reads one value: JSON, else a Python literal, else the text itself.

    Args:
        text: What stands behind the equals sign.

    Returns:
        A number, bool, None, list, dict or string. `1_000` and `1e-4` are numbers.
    """
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def parse_stop(text: str) -> dict[str, float]:
    """Reads the value of `--stop`.

    Args:
        text: A JSON object of metric names and limits.

    Returns:
        The same as a dict.

    Raises:
        CommandError: If the text is no JSON object or a limit is no number.
    """
    try:
        stop = json.loads(text)
    except ValueError as error:
        raise CommandError(
            f"--stop is no valid JSON ({error}): {text!r}; "
            """write for example --stop '{"env_steps": 500000}'"""
        ) from error
    return check_stop(stop, "--stop")


def check_stop(stop: Any, source: str) -> dict[str, float]:
    """Checks that a stop condition is a dict of metric names and numbers.

    Args:
        stop: The condition, None for none.
        source: Where it comes from, for the message.

    Returns:
        The checked dict, empty for None.

    Raises:
        CommandError: If it is anything else, or a name looks like a short name mistyped: the run
            would never stop.
    """
    if stop is None:
        return {}
    if not isinstance(stop, Mapping):
        raise CommandError(
            f"{source} must map metric names to limits, got {type(stop).__name__}; "
            """write for example {"env_steps": 500000}"""
        )
    for name, limit in stop.items():
        number = isinstance(limit, Real) and not isinstance(limit, bool)
        if not isinstance(name, str) or not number or math.isnan(limit):
            raise CommandError(f"{source}: the limit of {name!r} must be a number, got {limit!r}")
        near = did_you_mean(name, STOP_ALIASES, cutoff=0.75)
        if near and "/" not in name and name not in STOP_ALIASES:
            raise CommandError(f"{source}: unknown metric {name!r}{near}")
    return dict(stop)


def apply_overrides(config: AlgorithmConfig, settings: Iterable[str]) -> None:
    """Applies `key=value` settings to a config, in order.

    Args:
        config: Changed in place.
        settings: Texts `field=value`; `field.sub.key=value` reaches into a dict field.

    Raises:
        CommandError: If the equals sign is missing, the field does not exist, a dotted
            field is no dict, the type of the value does not fit, or RLlib refuses it.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise CommandError(f"--set wants key=value, got {setting!r}")
        _apply(config, key, parse_value(text.strip()))


def field_names(config: AlgorithmConfig) -> list[str]:
    """Lists the fields that `--set` accepts for a config."""
    hidden = {"algo_class"}
    public = {name for name in vars(config) if not name.startswith("_") and name not in hidden}
    aliases = {alias for alias, name in FIELD_ALIASES.items() if hasattr(config, name)}
    return sorted(public | aliases)


def _apply(config: AlgorithmConfig, key: str, value: Any) -> None:
    """Sets one field, or one key inside a dict field."""
    root, *rest = key.split(".")
    known = field_names(config)
    if root not in known:
        name = type(config).__name__
        raise CommandError(f"--set {key}: {name} has no field {root!r}{did_you_mean(root, known)}")
    name = FIELD_ALIASES.get(root, root)
    current = getattr(config, name)
    if rest:
        value = _merged(current, rest, value, key)
    else:
        _check_type(key, current, value)
    try:
        config.update_from_dict({name: value})
    except (ValueError, TypeError, ImportError) as error:  # the path of a class may be wrong
        raise CommandError(f"--set {key}: {' '.join(str(error).split())}") from error


def _merged(current: Any, path: list[str], value: Any, key: str) -> dict[str, Any]:
    """Copies a nested dict with one leaf replaced."""
    if current is None:
        current = {}
    if not isinstance(current, Mapping):
        raise CommandError(
            f"--set {key}: {key.split('.')[0]!r} is no dict but {current!r}, "
            "so a dotted key cannot reach into it"
        )
    head, *rest = path
    leaf = _merged(current.get(head), rest, value, key) if rest else value
    return {**current, head: leaf}


def _check_type(key: str, current: Any, value: Any) -> None:
    """Refuses a value whose type cannot be meant; lists and dicts may be schedules or searches."""
    if value is None or isinstance(value, (list, dict)):
        return
    if isinstance(current, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(current, Number):
        # Some numeric fields take a word too ("auto" and the like); RLlib checks those itself.
        is_word = isinstance(value, str) and value == "auto"
        fits = is_word or (isinstance(value, Number) and not isinstance(value, bool))
        wanted = "a number"
    elif isinstance(current, Mapping):
        fits, wanted = False, "a dict as JSON, or a dotted key such as " + key + ".name=value"
    elif isinstance(current, type) and key not in _TAKES_A_PATH:
        fits, wanted = False, "a class, which only a file can set"
    else:
        return
    if not fits:
        raise CommandError(f"--set {key} wants {wanted}, got {value!r} (now {current!r})")
