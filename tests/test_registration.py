"""The algorithm and the environments are found by name, whatever happens to the Ray cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.rllib.algorithms.registry import ALGORITHMS
from ray.tune.registry import ENV_CREATOR, _global_registry, get_trainable_cls

import rllib_dreamer
from rllib_dreamer import DreamerConfig, DreamerTorch, register
from rllib_dreamer.envs.rendering import LIBRARIES, library_found

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_cluster() -> Iterator[None]:
    ray.shutdown()
    yield
    ray.shutdown()


def test_the_name_survives_a_new_cluster(no_cluster: None) -> None:
    for _ in range(2):
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        assert get_trainable_cls("DreamerTorch") is DreamerTorch
        assert _global_registry.contains(ENV_CREATOR, "dmc/walker-walk")
        ray.shutdown()


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
