"""Environments by name: `dmc/`, `robosuite/`, `atari100k/`, `ALE/` and any Gymnasium id.

`make_env(name, env_config)` builds one; `register_envs()` makes every name known to Ray Tune, so
that it works in `config.environment(name)`, on the command line and in remote env runners.
Importing this package imports no simulator.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym

from rllib_dreamer.envs import atari, dmc, rendering, robosuite, wrappers
from rllib_dreamer.envs import gymnasium as gymnasium_ids
from rllib_dreamer.envs.float_pictures import with_byte_pictures
from rllib_dreamer.near_names import nearest

__all__ = [
    "EnvCreator",
    "EnvSource",
    "action_repeat",
    "checked_creator",
    "env_names",
    "is_gymnasium_id",
    "make_env",
    "register_env",
    "register_envs",
    "shares_options",
    "validate_env",
    "validate_env_name",
]

EnvSource = str | Callable[..., Any]

_FAMILIES: dict[str, Any] = {
    "dmc": dmc,
    "DMC": dmc,
    "robosuite": robosuite,
    "atari100k": atari,
    "ALE": atari,
}
_OPTIONS: dict[str, Any] = {
    "dmc": dmc.DmcOptions,
    "DMC": dmc.DmcOptions,
    "robosuite": robosuite.RobosuiteOptions,
    **atari.OPTIONS,
}


def family_of(env: EnvSource) -> str | None:
    """The family of this package that a name belongs to: "dmc", "ALE" and so on; None if none."""
    prefix = env.partition("/")[0] if isinstance(env, str) and "/" in env else ""
    return prefix if prefix in _FAMILIES else None


def is_gymnasium_id(env: EnvSource) -> bool:
    """Whether `gym.make` builds it, not a family of this package (ale-py registers ids too)."""
    known = isinstance(env, str) and (env in gym.registry or ":" in env)
    return known and family_of(env) is None


def env_names() -> list[str]:
    """Returns every name that `register_envs()` registers, without importing a simulator."""
    return [*dmc.names(), *robosuite.names(), *atari.names()]


def validate_env_name(env: str) -> None:
    """Checks that `env` is a name that `make_env` or Ray Tune's registry knows.

    Args:
        env: A name of this package, one registered with Ray Tune, a Gymnasium id
            ("package:Id-v0" too), or the path of a class ("package.module.Class").

    Raises:
        ValueError: It is none of them; lists the nearest names.
    """
    family = family_of(env)
    if family is not None:
        _FAMILIES[family].parse_name(env)
        return
    if is_gymnasium_id(env) or _registered(env):
        return
    found = _class_at(env)
    if isinstance(found, type) and issubclass(found, gym.Env):
        return
    if found is not None:  # the name may be that of an exported policy: no other code is called
        raise ValueError(
            f"the environment {env!r} is not a class of gymnasium.Env: name one, or register what "
            "builds it, tune.register_env(name, creator)."
        )
    known = [*env_names(), *gym.registry]
    raise ValueError(
        f"Unknown env {env!r}: {nearest(env, known)} An env of your own is made known by "
        "ray.tune.register_env(name, creator)."
    )


def validate_env(env: Any, env_config: Mapping[str, Any]) -> None:
    """Checks what can be checked of `config.environment(env, env_config=...)` without building it.

    Raises:
        ValueError: An unknown name, an unknown key or a wrong value of the `env_config` of a
            family, a wrong value of a key that this package reads for a Gymnasium id, or a class
            of envs for several agents.
    """
    if isinstance(env, str):
        validate_env_name(env)
    source = _source_of(env)
    family = family_of(source)
    if family is not None:
        wrappers.parse_options(_OPTIONS[family], env_config, str(env))
    elif is_gymnasium_id(source):
        gymnasium_ids.split_config(env_config)
    elif not isinstance(source, str) and _is_multi_agent(source):
        raise _several_agents(_name_of(env))


def _class_at(path: str) -> Any:
    """What is at "package.module.Name"; None if there is nothing.

    Raises:
        ValueError: The module needs another that is not installed.
    """
    module, _, attribute = path.rpartition(".")
    if not module or "/" in path:
        return None
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return None
        raise ValueError(f"{module!r} cannot be imported: {error}. Install it.") from error


def action_repeat(env: EnvSource, env_config: Mapping[str, Any] | None = None) -> int:
    """Returns the env steps per agent step of an env.

    Args:
        env: Its name, also one given to `register_env`, or a class or creator. Outside of the
            families `env_config` decides, 1 by default.
        env_config: As in `config.environment(..., env_config=...)`.
    """
    config = env_config or {}
    family = family_of(_source_of(env))
    default = 1 if family is None else _OPTIONS[family].action_repeat
    return int(config.get("action_repeat", default))


def shares_options(env: EnvSource, other: EnvSource | None) -> bool:
    """Whether an `env_config` means the same to two envs: the same env, or two of one family."""
    if other is None or env == other:
        return env == other
    own, others = (_OPTIONS.get(family_of(_source_of(x)) or "") for x in (env, other))
    return own is not None and own is others


def make_env(
    env: EnvSource,
    env_config: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    timeout_s: float | None = None,
) -> gym.Env:
    """Builds an env whose output is checked, and whose float pictures are made uint8.

    Args:
        env: A name of `env_names()`, a Gymnasium id, the path of a class, or a callable that takes
            the `env_config`.
        env_config: Options of the family (docs/environments.md lists them). The worker index of
            a RLlib `EnvContext` shifts the seed of a family's first episode, so that runners
            differ.
        name: What error messages call the env; by default the name of `env`.
        timeout_s: Seconds that the env may take for a step or a reset; None for any time.

    Raises:
        ValueError: Unknown name or option, or an env for several agents.
        ImportError: The extra that brings the simulator is not installed.
    """
    config = {} if env_config is None else env_config  # an empty `EnvContext` is false
    bounds = bool(config.get("check_spaces", True))
    name = name or _name_of(env)
    built = _build(env, config)
    _refuse_other_envs(built, name)
    first_seed = wrappers.first_seed(config) if family_of(env) else None
    return with_byte_pictures(wrappers.CheckedEnv(built, name, bounds, timeout_s, first_seed))


def _build(env: EnvSource, env_config: Mapping[str, Any]) -> Any:
    family = family_of(env)
    if family is not None:
        return _FAMILIES[family].make(env, env_config)
    if isinstance(env, str) and not is_gymnasium_id(env):
        env = _class_at(env) or env
    return gymnasium_ids.make(env, env_config) if isinstance(env, str) else env(env_config)


def _name_of(env: EnvSource) -> str:
    return env if isinstance(env, str) else str(getattr(env, "__name__", type(env).__name__))


def _is_multi_agent(env: Any) -> bool:
    """Whether an env, or a class of envs, is RLlib's or PettingZoo's kind for several agents."""
    module = sys.modules.get("ray.rllib.env.multi_agent_env")
    cls = env if isinstance(env, type) else type(env)
    of_rllib = module is not None and issubclass(cls, module.MultiAgentEnv)
    return of_rllib or hasattr(env, "possible_agents")


def _several_agents(name: str) -> ValueError:
    return ValueError(
        f"Env {name!r} has several agents, which Dreamer does not support: give it an env for "
        "one agent, for example one that merges the agents into Dict spaces."
    )


def _refuse_other_envs(env: Any, name: str) -> None:
    if _is_multi_agent(env):
        raise _several_agents(name)
    if not isinstance(env, gym.Env):
        raise ValueError(
            f"Env {name!r} is a {type(env).__name__}, not a gymnasium.Env: wrap it in a "
            "gymnasium.Env with reset() -> (obs, info) and a step() of five results."
        )


@dataclass(frozen=True)
class EnvCreator:
    """What Ray Tune stores for a name: builds the env wherever an env runner lives.

    Attributes:
        env: A name, or a class or function that takes the `env_config`.
        mujoco_gl: The driver's `MUJOCO_GL`, used on machines that set none.
        name: As of `make_env`.
        timeout_s: As of `make_env`.
    """

    env: EnvSource
    mujoco_gl: str | None = field(default_factory=rendering.requested_backend)
    name: str | None = None
    timeout_s: float | None = None

    def __call__(self, env_context: Mapping[str, Any] | None = None) -> gym.Env:
        """Builds the env from RLlib's `EnvContext`."""
        if self.mujoco_gl:
            rendering.setup_rendering(self.mujoco_gl, required=False)
        return make_env(self.env, env_context, name=self.name, timeout_s=self.timeout_s)


def checked_creator(env: EnvSource, timeout_s: float | None = None) -> EnvCreator:
    """Returns what builds the env that `config.env` stands for, with its output checked.

    Args:
        env: Also a name that was registered by `ray.tune.register_env`.
        timeout_s: As of `make_env`.
    """
    if not isinstance(env, str) or not _registered(env):
        return EnvCreator(env, timeout_s=timeout_s)
    registered = _registered_creator(env)
    if not isinstance(registered, EnvCreator):
        registered = EnvCreator(registered, name=env)
    return dataclasses.replace(registered, timeout_s=timeout_s)


def register_env(env: EnvSource, name: str | None = None) -> str:
    """Registers one env with Ray Tune, with its output checked; returns its name.

    For names of this package `register_envs()` does it. This is for Gymnasium ids and for a class
    or creator of your own that should get the same checks.
    """
    from ray import tune

    name = name or _name_of(env)
    tune.register_env(name, EnvCreator(env))
    return name


def _source_of(env: EnvSource) -> EnvSource:
    """What was registered under a name by `register_env`; anything else comes back as it is."""
    if isinstance(env, str) and family_of(env) is None and _registered(env):
        env = _registered_creator(env)
    return env.env if isinstance(env, EnvCreator) else env


def _registered(name: str) -> bool:
    from ray.tune.registry import ENV_CREATOR, _global_registry

    return bool(_global_registry.contains(ENV_CREATOR, name))


def _registered_creator(name: str) -> Callable[..., Any]:
    from ray.tune.registry import ENV_CREATOR, _global_registry

    creator: Callable[..., Any] = _global_registry.get(ENV_CREATOR, name)
    return creator


def register_envs() -> None:
    """Registers every name of `env_names()` with Ray Tune.

    May be called any number of times: it does nothing while the names are known, and registers them
    again after `ray.shutdown()`, which empties Ray's registry.
    """
    names = env_names()
    if _registered(names[-1]):
        return
    for name in names:
        register_env(name)
