"""Settings of which Tune draws or lists the values, checked before anything is started."""

from __future__ import annotations

from itertools import islice
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune.search.variant_generator import generate_variants, parse_spec_vars

from rllib_dreamer.cli.errors import CommandError, first_line

#: Of a grid, how many combinations are tried; a check takes a twentieth of a second.
MAX_SAMPLES = 32


def has_search(value: Any) -> bool:
    """Tells whether a setting is, or holds, a grid search or a random domain of Tune."""
    _, domains, grids = parse_spec_vars({"value": value})
    return bool(domains or grids)


def samples(config: AlgorithmConfig) -> list[AlgorithmConfig]:
    """Draws configs without searches, so that what all trials need can be checked.

    Args:
        config: Is not changed.

    Returns:
        The config itself if it has no search, else a copy for each combination of the grid with
        random domains drawn, `MAX_SAMPLES` at most.

    Raises:
        CommandError: If a search is malformed.
    """
    settings = config.to_dict()
    try:
        searched = [key for key, value in settings.items() if has_search(value)]
        if not searched:
            return [config]
        variants = islice(generate_variants({"config": settings}), MAX_SAMPLES)
        drawn = [variant["config"] for _, variant in variants]
    except Exception as error:  # a search may hold any function
        reason = first_line(error.__context__ or error)  # Tune's own words do not say why
        raise CommandError(
            f"a search of the config cannot be drawn from ({reason}); write it like "
            '{"grid_search": [1, 2]}, or tune.uniform(0, 1) and the like in a file'
        ) from error
    if not drawn:
        raise CommandError("a grid_search of the config is empty; give it at least one value")
    return [_with_values(config, {key: values[key] for key in searched}) for values in drawn]


def _with_values(config: AlgorithmConfig, values: dict[str, Any]) -> AlgorithmConfig:
    copied = config.copy(copy_frozen=False)
    copied.update_from_dict(values)
    return copied
