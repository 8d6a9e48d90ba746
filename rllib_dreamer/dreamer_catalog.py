"""From Gymnasium spaces to the parts of the agent: the class to subclass for other observations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from ray.rllib.core.models.catalog import Catalog
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from torch import nn

from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.behavior import Behavior
from rllib_dreamer.model.codec import Decoder, Encoder
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ModelConfig, ObsSpec, model_config
from rllib_dreamer.model.world_model import WorldModel
from rllib_dreamer.spaces import is_image, leaf_spaces


class DreamerCatalog(Catalog):
    """Builds encoder, decoder, world model, behavior and the agent that holds them.

    Override `build_encoder` and `build_decoder` to bring another kind of observation, and
    `obs_spec` if the space itself is of a kind that is refused here. Hand the class over with
    `config.rl_module(rl_module_spec=RLModuleSpec(catalog_class=...))`.

    Args:
        observation_space: Any nesting of images (uint8), vectors, Discrete, MultiDiscrete and
            MultiBinary.
        action_space: Any nesting of Box, Discrete, MultiDiscrete and MultiBinary.
        model_config_dict: `model_size`, `loss` (fields of `LossConfig`), `initial_random_steps`
            and any field of `ModelConfig`.

    Raises:
        ValueError: If a leaf of a space is of an unsupported kind or shape.
    """

    #: Keys of `model_config` that a subclass reads, beside those above.
    extra_settings: tuple[str, ...] = ()

    observation_leaves: dict[str, gym.Space]
    action_leaves: dict[str, gym.Space]

    def _determine_components_hook(self) -> None:
        """Works out the specs; RLlib's own decision tree knows no dicts and is not asked."""
        self.observation_leaves = leaf_spaces(self.observation_space)
        self.action_leaves = leaf_spaces(self.action_space, root="action")
        self.obs_specs = {k: self.obs_spec(k, s) for k, s in self.observation_leaves.items()}
        self.action_specs = {k: action_spec(k, s) for k, s in self.action_leaves.items()}
        _check_names(self.obs_specs)
        given = self._model_config_dict
        self.model_config: ModelConfig = model_config(
            given.get("model_size", "12M"), **model_settings(given, self.extra_settings)
        )
        _check_image_sizes(self.obs_specs, 2 ** len(self.model_config.mults))
        self.loss_config = LossConfig(**given.get("loss", {}))
        self.initial_random_steps: int = given.get("initial_random_steps", 0)
        self.fuse = bool(given.get("compile", True))

    def obs_spec(self, key: str, space: gym.Space) -> ObsSpec:
        """The model's view of one observation leaf."""
        return obs_spec(key, space)

    def get_action_dist_cls(self, framework: str) -> None:
        """None: the agent samples its actions itself."""
        return None

    def build_encoder(self, framework: str = "torch") -> nn.Module:
        """A module with `embed`, its output width, mapping leaves (n, ...) to tokens (n, embed)."""
        return Encoder(self.obs_specs, self.model_config)

    def build_decoder(self, framework: str = "torch") -> nn.Module | None:
        """A module as `WorldModel` describes, or None to learn without reconstruction."""
        return Decoder(self.obs_specs, self.model_config)

    def build_world_model(self) -> WorldModel:
        """The world model around encoder and decoder."""
        return WorldModel(
            self.build_encoder(framework="torch"),
            self.build_decoder(framework="torch"),
            self.action_specs,
            self.model_config,
        )

    def build_behavior(self) -> Behavior:
        """Actor and critic."""
        return Behavior(self.action_specs, self.model_config, self.loss_config)

    def build_agent(self) -> Agent:
        """The whole agent."""
        return Agent(self.build_world_model(), self.build_behavior(), self.loss_config)


def obs_spec(key: str, space: gym.Space) -> ObsSpec:
    """Translates one leaf of the observation space.

    Raises:
        ValueError: If the leaf is of an unsupported kind or shape.
    """
    if is_image(space):
        shape = space.shape or ()
        return ObsSpec("image", shape if len(shape) == 3 else (*shape, 1))
    if isinstance(space, spaces.Box) and len(space.shape) <= 2:
        return ObsSpec("vector", (int(np.prod(space.shape, dtype=int)),))
    discrete = _discrete(space)
    if discrete is not None:
        return ObsSpec("discrete", (len(discrete),), max(discrete))
    hint = "use a uint8 Box of shape (H, W, C) for pictures and one of rank <= 2 for vectors"
    raise ValueError(f"observation_space[{key!r}] = {space} is not supported: {hint}.")


def action_spec(key: str, space: gym.Space) -> ActionSpec:
    """Translates one leaf of the action space.

    Raises:
        ValueError: If the leaf is of an unsupported kind.
    """
    discrete = _discrete(space)
    if discrete is not None:
        limits = tuple(discrete) if len(set(discrete)) > 1 else ()
        return ActionSpec("discrete", len(discrete), max(discrete), limits)
    if isinstance(space, spaces.Box) and space.dtype in (np.float32, np.float64):
        bounds = np.stack([space.bounded_below, space.bounded_above])
        if bounds.any() and not bounds.all():
            raise ValueError(
                f"action_space[{key!r}] = {space} is bounded in part: actions are scaled to the "
                "bounds, so give every component both bounds, or none any."
            )
        return ActionSpec("continuous", int(np.prod(space.shape, dtype=int)))
    raise ValueError(
        f"action_space[{key!r}] = {space} is not supported: use a Box of float32 or float64, "
        "Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of these."
    )


def _discrete(space: gym.Space) -> list[int] | None:
    """Number of classes of each component of a discrete space; None for other spaces."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.flatten()]
    if isinstance(space, spaces.MultiBinary):
        return [2] * int(np.prod(space.shape, dtype=int))
    return None


def _check_image_sizes(specs: Mapping[str, ObsSpec], shrink: int) -> None:
    """Raises ValueError unless all images share one size, which the encoder divides by `shrink`."""
    sizes = {key: spec.shape[:2] for key, spec in specs.items() if spec.kind == "image"}
    for key, (h, w) in sizes.items():
        channels = specs[key].shape[2]
        if h < min(w, channels):
            raise ValueError(
                f"observation_space[{key!r}] is {h}x{w}x{channels}, like a picture with its "
                "channels first: give height, width, channels, by np.moveaxis(picture, 0, -1)."
            )
        if h % shrink or w % shrink or not (32 <= h <= 256 and 32 <= w <= 256):
            symbols = " (a grid of symbols: make it a float32 vector or a MultiDiscrete)"
            raise ValueError(
                f"observation_space[{key!r}] is an image of {h}x{w}: height and width must be "
                f"multiples of {shrink} between 32 and 256; resize it, e.g. to 64x64"
                f"{symbols if max(h, w) < 32 else ''}."
            )
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"observation_space has images of different sizes, {sizes}: resize them to one size, "
            "they are stacked along their channels."
        )


def _check_names(specs: Mapping[str, ObsSpec]) -> None:
    """Raises ValueError if a leaf is called like a loss: its reconstruction loss has its name."""
    taken = sorted(specs.keys() & (LossConfig().scales.keys() - {"rec"}))
    if taken:
        raise ValueError(
            f"observation_space has keys {taken}, which are names of losses: rename them, for "
            f"example to {[f'last_{key}' for key in taken]}."
        )


def model_settings(given: Mapping[str, Any], extra: Collection[str] = ()) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` in a `model_config` dict: no other key is let pass.

    Args:
        given: What the RLModule got: our settings, the user's, and where the user gave a
            `DefaultModelConfig` all of RLlib's, which mean nothing here and must be untouched.
        extra: More keys that are allowed.

    Raises:
        ValueError: If a key means nothing.
    """
    ours = {field.name for field in fields(ModelConfig)}
    rllib = asdict(DefaultModelConfig())
    settings = {"model_size", "loss", "compile", "initial_random_steps", *extra}
    untouched = {key for key, value in rllib.items() if key in given and given[key] == value}
    unknown = sorted(set(given) - ours - settings - untouched)
    if unknown:
        raise ValueError(
            f"model_config has keys {unknown} that mean nothing here (RLlib's are for networks of "
            f"its own): it takes the fields of ModelConfig, {', '.join(sorted(ours))}; a catalog "
            "may add some by `extra_settings`."
        )
    return {key: value for key, value in given.items() if key in ours}
