"""How well a world model knows the episodes that were played.

*Posterior*: what the states that the policy acted on decode to, against the observations they were
inferred from. *Open loop*: after `CONTEXT` shown steps of a window the model imagines on with the
actions that were taken, seeing nothing more, and is held against what came. A window begins with a
state of the acting policy, which has seen the episode from its start: so do the imagined
trajectories that the agent learns from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from rllib_dreamer.evaluation.episodes import Episode
from rllib_dreamer.evaluation.reconstruction import (
    FrameQuality,
    HeadErrors,
    OpenLoopQuality,
    frame_quality,
    head_errors,
    open_loop_quality,
    repeat_last_context,
)
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.distributions import Noise
from rllib_dreamer.model.rssm import State
from rllib_dreamer.policy import imagination
from rllib_dreamer.policy.imagination import CONTEXT
from rllib_dreamer.spaces import canonical, is_image

AHEAD = 45
"""Steps of a window that are imagined, at most."""

_RECONSTRUCTIONS = 1000  # frames compared in all, evenly spaced in time
_WINDOWS = 40  # windows in all


class ImageQuality(NamedTuple):
    """Quality of one image leaf; `still` is the last context frame held, the baseline."""

    posterior: FrameQuality
    open_loop: OpenLoopQuality | None
    still: OpenLoopQuality | None


class Windows(NamedTuple):
    """Open loops of one image leaf: frames (W, T, h, w, C) uint8, valid (W, T) before the end."""

    model: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    valid: NDArray[np.bool_]


class WorldModelResult(NamedTuple):
    """What was measured.

    Attributes:
        images: By image leaf.
        vectors: Root mean squared error of the other real leaves, (posterior, open loop), in their
            units; open loop is NaN without windows.
        heads: Reward and continue errors of the posterior.
        heads_open_loop: The same while imagining, None without windows.
        windows: By image leaf, None where no episode was long enough.
    """

    images: dict[str, ImageQuality]
    vectors: dict[str, tuple[float, float]]
    heads: HeadErrors
    heads_open_loop: HeadErrors | None
    windows: dict[str, Windows] | None


class WorldModelProbe:
    """Collects predictions episode by episode, so that no episode has to be kept.

    Args:
        agent: The agent that played.
        spaces: Observation leaves.
        episodes: How many episodes there will be, to spread the comparisons over them.
        noise: For imagined latents.
    """

    def __init__(
        self, agent: Agent, spaces: Mapping[str, gym.Space], episodes: int, noise: Noise
    ) -> None:
        self.agent, self.noise = agent, noise
        shown = imagination.decoded_leaves(agent)
        decoded = {key: space for key, space in spaces.items() if key in shown}
        self.images = {key: space for key, space in decoded.items() if is_image(space)}
        self.vectors = {
            key: space
            for key, space in decoded.items()
            if isinstance(space, gym.spaces.Box) and not is_image(space)
        }
        self.episodes = episodes
        self.frames_each = math.ceil(_RECONSTRUCTIONS / episodes)
        self.windows_each = math.ceil(_WINDOWS / episodes)
        self.quality: dict[str, list[FrameQuality]] = {key: [] for key in self.images}
        self.errors: dict[str, tuple[list[SquaredError], list[SquaredError]]] = {
            key: ([], []) for key in self.vectors
        }
        self.heads: list[NDArray[np.float64]] = []
        self.open_heads: list[NDArray[np.float64]] = []
        self.lengths: list[int] = []
        self.windows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {k: [] for k in self.images}

    def add(self, episode: Episode) -> None:
        """Measures one episode."""
        for start in range(1, len(episode.deter), imagination.AT_ONCE):  # a reset has no reward
            end = min(start + imagination.AT_ONCE, len(episode.deter))
            steps = np.arange(start, end)[None]
            self.heads.append(self._heads(self._states(episode, steps), episode, steps))
        phase = (episode.index + 0.5) / self.episodes
        chosen = _spread(len(episode.deter), self.frames_each, phase)
        decoded = imagination.decode(self.agent, self._states(episode, chosen[None]))
        for key, space in self.images.items():
            truth = canonical(episode.obs[key][chosen], space)
            self.quality[key].append(frame_quality(_pixels(decoded[key][0]), truth))
        for key, space in self.vectors.items():
            truth = canonical(episode.obs[key][chosen], space)
            self.errors[key][0].append(_squared_error(decoded[key][0], truth))
        length = min(CONTEXT + AHEAD, len(episode.deter))
        if length > CONTEXT:
            starts = _spread(len(episode.deter) - length + 1, self.windows_each, phase)
            self._open_loop(episode, starts[:, None] + np.arange(length))

    def result(self) -> WorldModelResult:
        """Sums up.

        Raises:
            ValueError: If no episode was added.
        """
        windows = self._padded_windows() if self.open_heads else None
        return WorldModelResult(
            {key: self._image_quality(key, windows) for key in self.images},
            {
                key: tuple(_root_mean(part) for part in parts)  # type: ignore[misc]
                for key, parts in self.errors.items()
            },
            _head_errors(self.heads),
            _head_errors(self.open_heads) if self.open_heads else None,
            windows or None,
        )

    def _image_quality(self, key: str, windows: Mapping[str, Windows] | None) -> ImageQuality:
        joined = zip(*self.quality[key], strict=True)
        posterior = FrameQuality(*(np.concatenate(parts) for parts in joined))
        if windows is None:
            return ImageQuality(posterior, None, None)
        model, truth, valid = windows[key]
        still = repeat_last_context(truth, CONTEXT)
        return ImageQuality(
            posterior,
            open_loop_quality(model, truth, CONTEXT, valid=valid),
            open_loop_quality(still, truth, CONTEXT, valid=valid),
        )

    def _open_loop(self, episode: Episode, steps: NDArray[np.int64]) -> None:
        """Imagines windows (W, length) of one episode, given by the numbers of their steps."""
        context = self._states(episode, steps[:, :CONTEXT])
        actions = torch.from_numpy(episode.actions[steps[:, CONTEXT - 1 : -1]])
        begin = State(context.deter[:, -1], context.stoch[:, -1])
        actions = actions.to(begin.deter.device)
        future = imagination.roll_out(self.agent, begin, actions, self.noise)
        self.open_heads.append(self._heads(future, episode, steps[:, CONTEXT:]))
        self.lengths += [steps.shape[1]] * len(steps)
        whole = State(*(torch.cat(parts, 1) for parts in zip(context, future, strict=True)))
        decoded = imagination.decode(self.agent, whole)
        for key, space in self.images.items():
            truth = canonical(episode.obs[key][steps], space)  # (W, length, h, w, C)
            self.windows[key] += zip(_pixels(decoded[key]), truth, strict=True)
        for key, space in self.vectors.items():
            truth = canonical(episode.obs[key][steps[:, CONTEXT:]], space)
            self.errors[key][1].append(_squared_error(decoded[key][:, CONTEXT:], truth))

    def _states(self, episode: Episode, steps: NDArray[np.int64]) -> State:
        """States (W, length, D), (W, length, S, K) of steps (W, length) of an episode."""
        device = next(self.agent.parameters()).device
        deter, stoch = (
            torch.from_numpy(x[steps]).to(device) for x in (episode.deter, episode.stoch)
        )
        return self.agent.world.rssm.state(deter, stoch)

    def _heads(
        self, states: State, episode: Episode, steps: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Rows (reward predicted, real, continue predicted, real) of steps (W, length), all > 0."""
        reward, cont = (x.cpu().numpy() for x in imagination.predict_heads(self.agent, states))
        over = episode.terminated & (steps == episode.length)
        real = episode.rewards[steps - 1]
        return np.stack([reward, real, cont, 1.0 - over]).astype(np.float64).reshape(4, -1)

    def _padded_windows(self) -> dict[str, Windows]:
        """Windows of equal length: short ones repeat their last frames, which do not count."""
        longest = max(self.lengths)
        valid = np.arange(longest) < np.array(self.lengths)[:, None]  # (W, T)
        padded = {}
        for key, pairs in self.windows.items():
            model, truth = (
                np.stack([_pad(pair[side], longest) for pair in pairs]) for side in (0, 1)
            )
            padded[key] = Windows(model, truth, valid)
        return padded


def _spread(length: int, count: int, phase: float) -> NDArray[np.int64]:
    """At most `count` different positions, evenly spread over 0 .. length - 1.

    The phase, in [0, 1), shifts them by that share of their distance, so that episodes with few
    positions each cover all of their lengths together.
    """
    count = min(count, length)
    return np.floor((np.arange(count) + phase) * length / count).astype(np.int64)


def _pad(frames: np.ndarray, length: int) -> np.ndarray:
    return np.pad(frames, [(0, length - len(frames)), (0, 0), (0, 0), (0, 0)], mode="edge")


def _pixels(frames: torch.Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = imagination.pixels(frames).cpu().numpy()
    return found


class SquaredError(NamedTuple):
    """Sum of squared errors, and of how many numbers."""

    total: float
    numbers: int


def _squared_error(predicted: torch.Tensor, truth: np.ndarray) -> SquaredError:
    error: NDArray[Any] = predicted.cpu().numpy() - truth.astype(np.float64)
    finite = error[np.isfinite(error)]
    return SquaredError(float(np.square(finite).sum()), finite.size)


def _root_mean(errors: list[SquaredError]) -> float:
    """Over all numbers alike, whichever episode they are from; NaN without any."""
    count = sum(error.numbers for error in errors)
    return math.sqrt(sum(error.total for error in errors) / count) if count else math.nan


def _head_errors(rows: list[NDArray[np.float64]]) -> HeadErrors:
    return head_errors(*np.concatenate(rows, 1))
