from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from tiny import (
    CONTINUOUS,
    DISCRETE,
    IMAGE,
    MIXED,
    MODEL,
    VECTOR,
    agent_of,
    built,
    tiny_config,
    train_until,
)

from rllib_dreamer.dreamer_catalog import DreamerCatalog
from rllib_dreamer.dreamer_torch_rl_module import DreamerTorchRLModule
from rllib_dreamer.model.sizes import ActionSpec, ObsSpec

ROOT = Path(__file__).resolve().parents[1]
PAIRS: dict[str, tuple[gym.Space, gym.Space]] = {
    "vector": (VECTOR, CONTINUOUS),
    "image": (IMAGE, DISCRETE),
    "image-48x64x1": (spaces.Box(0, 255, (48, 64, 1), np.uint8), spaces.Discrete(3, start=-1)),
    "gray-2d": (spaces.Box(0, 255, (32, 32), np.uint8), spaces.MultiDiscrete([2, 4, 3])),
    "cameras": (
        spaces.Dict({"b": IMAGE, "a": spaces.Box(0, 255, (32, 32, 1), np.uint8)}),
        spaces.MultiDiscrete([2, 4], start=[1, -3]),
    ),
    "mixed": (MIXED, spaces.Dict({"move": CONTINUOUS, "jump": spaces.Discrete(2, start=1)})),
    "vector-rank-0": (spaces.Box(-1, 1, (), np.float32), spaces.Box(-1, 2, (), np.float32)),
    "vector-rank-2": (spaces.Box(-1, 1, (2, 3)), spaces.Box(-2, 2, (2, 3), np.float32)),
    "vector-uint8": (spaces.Box(0, 255, (4,), np.uint8), spaces.MultiBinary(3)),
    "vector-int": (spaces.Box(0, 9, (2,), np.int64), spaces.MultiBinary((2, 3))),
    "vector-unbounded": (
        spaces.Box(-np.inf, np.inf, (2,), np.float32),
        spaces.Box(-np.inf, np.inf, (2,), np.float32),
    ),
    "discrete": (spaces.Discrete(5), spaces.Tuple((DISCRETE, CONTINUOUS))),
    "discrete-start": (spaces.Discrete(5, start=2), spaces.Box(-2, 2, (2,), np.float64)),
    "multi-discrete": (
        spaces.MultiDiscrete([2, 4, 3], start=[1, 0, -2]),
        spaces.MultiDiscrete([[2, 3], [4, 2]]),
    ),
    "multi-discrete-2d": (
        spaces.MultiDiscrete([[2, 3], [4, 2]]),
        spaces.Box(np.array([-3, 0.5], np.float32), np.array([7, 0.75], np.float32)),
    ),
    "multi-binary": (spaces.MultiBinary((2, 3)), spaces.Discrete(2)),
    "nested": (
        spaces.Dict(
            {
                "z": spaces.Tuple((VECTOR, spaces.Discrete(3, start=1))),
                "a": spaces.Dict({"cam.1": IMAGE, "flags": spaces.MultiBinary(2)}),
            }
        ),
        spaces.Dict(
            {
                "a": spaces.Tuple((spaces.MultiDiscrete([2, 3]), CONTINUOUS)),
                "b": spaces.Dict({"c": spaces.MultiBinary(2)}),
            }
        ),
    ),
    "tuple": (spaces.Tuple((VECTOR, spaces.MultiDiscrete([2, 3]))), CONTINUOUS),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_supported_space_trains(name: str) -> None:
    """The environment itself refuses actions outside of its space."""
    obs, action = PAIRS[name]
    config = tiny_config(observation_space=obs, action_space=action)
    with built(config.env_runners(num_envs_per_env_runner=2)) as algo:
        results = train_until(algo, 2)["learners"]["default_policy"]
        leaves = algo.env_runner.module.catalog.observation_leaves
    losses = {key: float(x) for key, x in results.items() if key.startswith("loss_")}
    assert {f"loss_{key}" for key in leaves} <= losses.keys()
    assert all(np.isfinite(x) for x in losses.values()), losses


def catalog(obs: gym.Space = VECTOR, action: gym.Space = DISCRETE, **model: Any) -> DreamerCatalog:
    return DreamerCatalog(obs, action, {"model_size": "1M", **MODEL, **model})


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (spaces.Box(0, 1, (32, 32, 3), np.float32), r"observation_space\['vector'\].*uint8 Box"),
        (spaces.Dict({"a": spaces.Text(5)}), r"observation_space\['a'\].*not supported"),
        (spaces.Sequence(VECTOR), "not supported"),
        (spaces.Box(0, 255, (40, 32, 3), np.uint8), "image of 40x32: .* multiples of 16"),
        (spaces.Box(0, 255, (16, 16, 3), np.uint8), "resize it, .* grid of symbols"),
        (spaces.Box(0, 255, (272, 64, 3), np.uint8), "between 32 and 256"),
        (
            spaces.Box(0, 255, (3, 64, 64), np.uint8),
            r"is 3x64x64, like a picture with its channels",
        ),
        (
            spaces.Dict({"a": IMAGE, "b": spaces.Box(0, 255, (64, 64, 3), np.uint8)}),
            "images of different sizes",
        ),
        (spaces.Dict({"reward": VECTOR, "x": VECTOR}), r"keys \['reward'\].*'last_reward'"),
    ],
)
def test_an_unsupported_observation_is_refused(obs: gym.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        catalog(obs)


def test_the_size_of_images_goes_with_the_number_of_stages() -> None:
    frames = spaces.Box(0, 255, (40, 64, 3), np.uint8)
    assert catalog(frames, mults=(2, 3, 4)).obs_specs["image"].shape == (40, 64, 3)
    with pytest.raises(ValueError, match=r"image of 40x64: .* multiples of 32"):
        catalog(frames, mults=(2, 3, 4, 4, 4))


HALF = spaces.Box(np.array([0, -1], np.float32), np.array([np.inf, 1], np.float32))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (spaces.Box(0, 5, (2,), np.int64), r"action_space\['action'\].*Box of float32 or float64"),
        (spaces.Box(-5, 5, (2,), np.float16), r"float16\) is not supported: use a Box of float32"),
        (spaces.Dict({"say": spaces.Text(5)}), r"action_space\['say'\].*not supported"),
        (spaces.Box(0, np.inf, (2,), np.float32), "is bounded in part: .* both bounds"),
        (HALF, "is bounded in part"),
    ],
)
def test_an_unsupported_action_is_refused(action: gym.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        catalog(action=action)


def test_the_message_reaches_whoever_builds_the_algorithm() -> None:
    config = tiny_config(observation_space=spaces.Box(0, 255, (40, 40, 3), np.uint8))
    with pytest.raises(ValueError, match="image of 40x40"), built(config):
        pass


def test_a_misspelt_key_of_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keys \['depht'\]"):
        catalog(depht=3)
    with (
        pytest.raises(ValueError, match=r"keys \['depht'\]"),
        built(tiny_config(model={"depht": 3})),
    ):
        pass


def test_specs() -> None:
    c = catalog(
        MIXED, spaces.Dict({"a": spaces.MultiDiscrete([2, 4], start=[1, 0]), "b": CONTINUOUS})
    )
    assert c.obs_specs == {
        "camera": ObsSpec("image", (32, 32, 3)),
        "joints": ObsSpec("vector", (3,)),
        "mode": ObsSpec("discrete", (1,), 4),
    }
    assert c.action_specs == {
        "a": ActionSpec("discrete", 2, 4, (2, 4)),
        "b": ActionSpec("continuous", 2),
    }


def test_settings_reach_the_parts() -> None:
    config = tiny_config(model={"actor_layers": 1}, training={"horizon_H": 2, "symlog_obs": False})
    with built(config) as algo:
        agent = agent_of(algo)
        assert agent.world.config.deter == MODEL["deter"]
        assert len(agent.behavior.actor.mlp) == 1
        assert not agent.world.encoder.symlog
        assert agent.loss.horizon == 2


def test_a_module_without_a_catalog_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a catalog_class"):
        DreamerTorchRLModule(observation_space=VECTOR, action_space=DISCRETE, model_config={})


def test_the_catalog_of_the_documentation_trains() -> None:
    text = (ROOT / "docs" / "custom_observation.md").read_text()
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    obs = spaces.Dict({"camera": IMAGE, "instruction": spaces.Box(-9, 9, (8,), np.float32)})
    config = tiny_config(observation_space=obs)
    config.rl_module(rl_module_spec=names["spec"], model_config={**MODEL, "text_layers": 3})
    with built(config) as algo:
        encoder = agent_of(algo).world.encoder
        before = [p.detach().clone() for p in encoder.text.parameters()]
        losses = train_until(algo, 3)["learners"]["default_policy"]
        assert len(encoder.text) == 3
        assert all((a != b).any() for a, b in zip(before, encoder.text.parameters(), strict=True))
        assert "loss_camera" in losses
        assert "loss_instruction" not in losses
