"""A trained policy to act with: no environment, no Ray cluster, numpy in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rllib_dreamer.box_checks import FULL_CHECKS
from rllib_dreamer.model.agent import ActState, Agent
from rllib_dreamer.model.distributions import RandomNoise
from rllib_dreamer.model.rssm import State
from rllib_dreamer.model.world_model import encode_action
from rllib_dreamer.policy import imagination
from rllib_dreamer.policy.action_units import CONVERSIONS, to_array, to_env, to_model
from rllib_dreamer.policy.parts import PolicyParts
from rllib_dreamer.policy.value_checks import (
    ALL,
    NONE,
    Bounded,
    check_future,
    check_observation,
    first_steps,
    leading_axes,
)
from rllib_dreamer.spaces import canonical, is_image, leaf_spaces, restore, unflatten

if TYPE_CHECKING:
    from ray.tune import Checkpoint


class Imagination(NamedTuple):
    """A future that the world model expects, step i being that after action i of the future.

    Attributes:
        obs: As the observation space nests it, each leaf (H, ...) or (B, H, ...): pictures uint8,
            vectors in their units. None for a leaf that is not reconstructed.
        reward: Expected rewards (H,) or (B, H).
        cont: Probability that the episode goes on, in [0, 1], likewise.
    """

    obs: Any
    reward: NDArray[np.float32]
    cont: NDArray[np.float32]


class SeededNoise:
    """Noise from a generator of its own; drawn on the CPU, so that every device gets the same."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Uniform noise in [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(device)

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard normal noise."""
        return torch.randn(shape, generator=self.generator).to(device)


class DreamerPolicy:
    """Acts as trained, in the original spaces and units.

        policy = DreamerPolicy.from_checkpoint("~/ray_results/walker_...")
        policy.reset()
        action = policy.act(obs)

    The policy has a memory, the recurrent state: call `reset` before each episode. The latents are
    sampled from the posterior while acting, as in training, also where the action itself is the
    most probable one; `seed` makes that repeatable.

    Args:
        agent: The trained agent.
        observation_space: What it observes.
        action_space: What it gives.
        conversion: How actions get the units of the env, see `action_units.CONVERSIONS`.
        env: The environment of the training, as in `config.environment(env)`; None if unknown.
        env_config: Its config.
        about: What else is known of where it comes from, by name.
        seed: Of the noise; None draws from PyTorch's global generator.

    Raises:
        ValueError: If the conversion is unknown.
    """

    def __init__(
        self,
        agent: Agent,
        observation_space: gym.Space,
        action_space: gym.Space,
        *,
        conversion: str = "unsquash",
        env: Any = None,
        env_config: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if conversion not in CONVERSIONS:
            raise ValueError(f"conversion: got {conversion!r}; must be one of {CONVERSIONS}.")
        self.agent = agent.eval().requires_grad_(False)
        self.observation_space, self.action_space = observation_space, action_space
        self.conversion = conversion
        self.env, self.env_config = env, dict(env_config or {})
        self.about: dict[str, Any] = dict(about or {})
        self.observation_leaves = leaf_spaces(observation_space)
        self.action_leaves = leaf_spaces(action_space, root="action")
        self.seed(seed)
        self.reset()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | Checkpoint,
        *,
        which: str = "best",
        device: str | torch.device = "cpu",
        seed: int | None = None,
    ) -> DreamerPolicy:
        """Loads the policy of a training checkpoint; builds no env and starts no Ray.

        RLlib's checkpoints are pickles: load only those that you trust. `export` makes a folder
        that holds none.

        Args:
            path: A checkpoint (a folder, or one of Tune on this machine), the folder of a trial or
                experiment, an exported policy, or "best" or "last" for the newest experiment in
                ~/ray_results.
            which: Of several checkpoints the "best" by mean return, as `rllib evaluate` takes it
                (the last where none is known), or the "last".
            device: Where to compute.
            seed: Of the noise.

        Raises:
            ValueError: If there is no such checkpoint, or it is unfinished, damaged, of another
                algorithm, or needs code that is not installed.
        """
        from rllib_dreamer.policy.export import is_exported

        path = getattr(path, "path", path)  # of a `ray.tune.Checkpoint`
        if is_exported(Path(path).expanduser()):
            return cls.load(path, device=device, seed=seed)
        from rllib_dreamer.policy.checkpoint_reader import find_checkpoint, read_checkpoint

        return cls._of(read_checkpoint(find_checkpoint(path, which)), device, seed)

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | torch.device = "cpu", seed: int | None = None
    ) -> DreamerPolicy:
        """Loads what `export` wrote; needs no Ray and unpickles nothing.

        Args:
            path: The folder.
            device: Where to compute.
            seed: Of the noise.

        Raises:
            ValueError: If the folder holds no whole exported policy.
        """
        from rllib_dreamer.policy.export import read_export

        return cls._of(read_export(Path(path).expanduser()), device, seed)

    @classmethod
    def _of(cls, parts: PolicyParts, device: str | torch.device, seed: int | None) -> DreamerPolicy:
        fields = parts._asdict() | {"agent": parts.agent.to(device)}
        return cls(**fields, seed=seed)

    def export(self, path: str | Path, formats: Sequence[str] = ("torch",)) -> Path:
        """Writes the policy as safetensors and JSON, with a model card; see `export.write_export`.

        Args:
            path: The folder to make.
            formats: How to write the step for other programs: "torch" (`torch.export`), "onnx".

        Returns:
            The folder.
        """
        from rllib_dreamer.policy.export import write_export

        parts = PolicyParts(
            self.agent,
            self.observation_space,
            self.action_space,
            self.conversion,
            self.env,
            self.env_config,
            self.about,
        )
        return write_export(parts, Path(path).expanduser(), formats)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.agent.parameters()).device

    @property
    def state(self) -> ActState:
        """The recurrent state after the last `act`; rows as in `reset`."""
        return self._state

    def seed(self, seed: int | None) -> None:
        """Starts the noise anew; None takes PyTorch's global generator."""
        self.agent.noise = RandomNoise() if seed is None else SeededNoise(seed)

    def reset(self, n: int | None = None) -> None:
        """Forgets everything: an episode begins.

        Args:
            n: Number of episodes side by side, whose observations and actions then have a leading
                axis of this length; None for a single one, without that axis.

        Raises:
            ValueError: If n is below 1.
        """
        if n is not None and n < 1:
            raise ValueError(f"n: got {n}; must be at least 1, or None for a single episode.")
        self._batched = n is not None
        self._steps = 0
        self._state = self.agent.initial_state(n or 1, self.device)

    def act(self, obs: Any, greedy: bool = True, is_first: NDArray[np.bool_] | None = None) -> Any:
        """Chooses an action.

        An observation is held against what training demands of the env's: never NaN or infinite
        (-inf is a missing value where its space begins there), and within the bounds of its space
        in the first steps after a `reset`.

        Args:
            obs: An observation of the observation space, or a batch of them after `reset(n)`.
            greedy: Takes the most probable action or the mean; else samples.
            is_first: (n,) True for rows whose episode begins with this observation.

        Returns:
            An action in the units of the env, as the action space nests it.

        Raises:
            ValueError: If an observation has another shape or dtype than the policy knows, or
                numbers that are refused.
        """
        rows = len(self._state.deter)
        bounded = ALL if self._steps < FULL_CHECKS else NONE
        leaves = self._observed(obs, (rows,) if self._batched else (), bounded)
        state = self._state if is_first is None else self._forgetting(np.asarray(is_first, bool))
        actions, self._state = self.agent.act(leaves, state, explore=not greedy)
        self._steps += 1
        arrays = {
            key: to_array(to_env(actions[key], space, self.conversion), space)
            for key, space in self.action_leaves.items()
        }
        if not self._batched:
            arrays = {key: x[0] for key, x in arrays.items()}
        return unflatten(arrays, self.action_space, root="action")

    def imagine(self, obs: Any, actions: Any) -> Imagination:
        """Observes the beginning of an episode, then imagines where given actions lead.

        The state of acting is left alone.

        Args:
            obs: Observations of the first C steps of an episode, leaves (C, ...) or (B, C, ...).
            actions: In the units of the env, leaves (C - 1 + H, ...) or (B, C - 1 + H, ...): those
                between the observations, then the H actions of the future.

        Returns:
            What the model expects of the H steps after the last observation.

        Raises:
            ValueError: If shapes or dtypes do not fit, a number is one that `act` refuses, or no
                action is left for the future.
        """
        lead = leading_axes(obs, self.observation_space)
        leaves = self._observed(obs, lead, first_steps(lead))
        encoded = self._encoded(actions, lead)
        context, noise = lead[-1], self.agent.noise
        if len(lead) == 1:
            leaves = {key: x.unsqueeze(0) for key, x in leaves.items()}  # (1, C, ...)
        states = imagination.observe(self.agent, leaves, encoded[:, : context - 1], noise)
        start = State(states.deter[:, -1], states.stoch[:, -1])
        future = imagination.roll_out(self.agent, start, encoded[:, context - 1 :], noise)
        found = imagination.predict(self.agent, future)
        arrays = {
            key: _as_observed(found.obs[key], space) if key in found.obs else None
            for key, space in self.observation_leaves.items()
        }
        reward, cont = found.reward.cpu().numpy(), found.cont.cpu().numpy()
        if len(lead) == 1:
            arrays = {k: None if x is None else x[0] for k, x in arrays.items()}
            reward, cont = reward[0], cont[0]
        return Imagination(unflatten(arrays, self.observation_space), reward, cont)

    def _observed(self, obs: Any, lead: tuple[int, ...], bounded: Bounded) -> dict[str, Tensor]:
        """Checked observation leaves in the model's form, (*lead, ...) or (1, ...) without lead."""
        if not self.env_config.get("check_spaces", True):  # nor did the training
            bounded = NONE
        arrays = check_observation(obs, self.observation_space, lead, bounded)
        leaves = {}
        for key, space in self.observation_leaves.items():
            tensor = torch.from_numpy(np.ascontiguousarray(arrays[key])).to(self.device)
            leaves[key] = canonical(tensor if lead else tensor.unsqueeze(0), space)
        return leaves

    def _encoded(self, actions: Any, lead: tuple[int, ...]) -> Tensor:
        """Checked actions (*lead, ...) in the env's units -> encoded (B, C - 1 + H, A)."""
        arrays = check_future(actions, self.action_space, lead)
        leaves = {
            key: to_model(torch.from_numpy(arrays[key]), space, self.conversion)
            for key, space in self.action_leaves.items()
        }
        encoded = encode_action(leaves, self.agent.world.actions).to(self.device)
        return encoded if len(lead) == 2 else encoded.unsqueeze(0)

    def _forgetting(self, is_first: NDArray[np.bool_]) -> ActState:
        """The state with the rows zeroed whose episode begins."""
        rows = len(self._state.deter)
        if is_first.size != rows:
            raise ValueError(
                f"is_first: got shape {is_first.shape}; must be ({rows},), one for each row."
            )
        zero = self.agent.initial_state(rows, self.device)
        first = torch.from_numpy(is_first.reshape(rows, 1)).to(self.device)
        return ActState(*map(lambda new, old: torch.where(first, new, old), zero, self._state))


def _as_observed(leaf: Tensor, space: gym.Space) -> np.ndarray:
    """A predicted leaf (B, H, n) or (B, H, h, w, C) in the form and dtype of its space."""
    if is_image(space):
        pixels = imagination.pixels(leaf)
        return pixels.reshape(*leaf.shape[:2], *(space.shape or ())).cpu().numpy()
    return to_array(restore(leaf, space), space)
