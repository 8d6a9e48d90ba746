"""The algorithm and the environments are found by name, whatever happens to the Ray cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.rllib.algorithms.registry import ALGORITHMS
from ray.rllib.env.env_context import EnvContext
from ray.tune.registry import ENV_CREATOR, _global_registry, get_trainable_cls
from tiny import start_ray

import rllib_dreamer
from rllib_dreamer import DreamerConfig, DreamerTorch, envs, register
from rllib_dreamer.envs.rendering import LIBRARIES, library_found

ROOT = Path(__file__).parents[1]
CARTPOLE = "dmc/cartpole-swingup"


def first_observation(creator: Any, **env_config: Any) -> Any:
    return creator(EnvContext(env_config, worker_index=1)).reset(seed=0)[0]


def test_names_survive_a_new_cluster() -> None:
    """Ray's registry dies with the cluster; a remote worker builds an env by its name."""
    start_ray()
    ray.shutdown()
    envs.register_envs()
    creator = _global_registry.get(ENV_CREATOR, CARTPOLE)
    assert first_observation(creator, observation="proprio").shape == (5,)

    _global_registry._to_flush.clear()  # the new cluster is told of none of that
    start_ray()
    assert not _global_registry.contains(ENV_CREATOR, CARTPOLE)
    assert get_trainable_cls("DreamerTorch") is DreamerTorch  # which brings the envs along
    assert _global_registry.contains(ENV_CREATOR, "dmc/walker-walk")

    for name in envs.env_names():
        _global_registry.unregister(ENV_CREATOR, name)
    for _ in range(2):
        envs.register_envs()
    creator = _global_registry.get(ENV_CREATOR, CARTPOLE)
    remote = ray.remote(first_observation)
    assert ray.get(remote.remote(creator, size=32)).shape == (32, 32, 3)


def test_registering_again_changes_nothing() -> None:
    entries = len(ALGORITHMS)
    register()
    register()
    assert len(ALGORITHMS) == entries
    algorithm, config = ALGORITHMS["DreamerTorch"]()
    assert algorithm is DreamerTorch
    assert type(config) is DreamerConfig


def test_public_names() -> None:
    assert set(rllib_dreamer.__all__) <= set(dir(rllib_dreamer))
    for name in rllib_dreamer.__all__:
        assert getattr(rllib_dreamer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Dreamer'"):
        _ = rllib_dreamer.Dreamer


def in_new_process(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True
    )
    return done.stdout.strip()


def test_import_chooses_a_renderer_before_rllib_loads_dm_control() -> None:
    code = "import os, rllib_dreamer; print(os.environ.get('MUJOCO_GL'))"
    found = next((name for name in LIBRARIES if library_found(name)), None)
    assert in_new_process(code) == str(found)
    assert in_new_process(code, MUJOCO_GL="glfw") == "glfw"


def test_the_model_is_usable_without_ray() -> None:
    code = (
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'ray' else found(name, *a)\n"
        "import sys, rllib_dreamer.model.ops; print('ray' in sys.modules)"
    )
    assert in_new_process(code) == "False"
