"""Plays episodes with a policy, several environments side by side in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rllib_dreamer.envs.success import success_of
from rllib_dreamer.evaluation.environments import MAX_FRAMES, frame_of
from rllib_dreamer.policy.policy import DreamerPolicy
from rllib_dreamer.spaces import flatten, unflatten

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Episode:
    """What happened, T agent steps long; index t of an array belongs to observation t.

    Attributes:
        index: Its number; the environment was reset with the seed of the evaluation plus this.
        rewards: (T,) in reward units, the reward at t arrived with observation t + 1.
        obs: Observation leaves (T + 1, ...), as the env gave them.
        deter: (T + 1, D) posterior states of the policy.
        stoch: (T + 1, S) their class indices.
        actions: (T, A) encoded actions.
        terminated: Whether the environment ended it.
        cut: Whether the evaluation ended it, by its limit of steps.
        success: Whether the environment told a success at any time; None if it tells nothing.
        frames: (T + 1, h, w, C) uint8 pictures, of a long episode the first `MAX_FRAMES`; None
            where nothing can be drawn.
    """

    index: int
    rewards: NDArray[np.float32]
    obs: dict[str, NDArray[Any]]
    deter: NDArray[np.float32]
    stoch: NDArray[np.int16]
    actions: NDArray[np.float32]
    terminated: bool
    cut: bool
    success: bool | None
    frames: NDArray[np.uint8] | None

    @property
    def length(self) -> int:
        """Agent steps."""
        return len(self.rewards)

    @property
    def total_return(self) -> float:
        """Sum of the rewards, not discounted."""
        return float(self.rewards.sum(dtype=np.float64))


class Rules(NamedTuple):
    """How episodes are played.

    Attributes:
        greedy: Whether actions are the mode or mean; else sampled.
        seed: Of the first episode's environment; episode k takes seed + k.
        max_steps: Agent steps after which an episode is cut off; None for no limit.
        draw: Whether to keep pictures.
    """

    greedy: bool = True
    seed: int = 0
    max_steps: int | None = None
    draw: bool = True


class _Latents(NamedTuple):
    """What the policy thought of one observation: deter (D,), stoch (S,), action (A,)."""

    deter: NDArray[np.float32]
    stoch: NDArray[np.int16]
    action: NDArray[np.float32]


def play(
    policy: DreamerPolicy,
    envs: Sequence[gym.Env],
    episodes: int,
    rules: Rules,
    on_step: OnStep = lambda: None,
) -> Iterator[Episode]:
    """Plays episodes to their end and gives each one as it ends.

    Every episode that begins is finished and counts, so that short ones are not preferred. The
    policy also sees the last observation of an episode, for which it takes no action.

    Args:
        policy: Its recurrent state is used and left behind.
        envs: Copies of one environment, stepped together.
        episodes: How many to play.
        rules: How.
        on_step: Called for each agent step of each environment.

    Yields:
        The episodes, in the order of their ends.
    """
    numbers = iter(range(episodes))
    rows = [_Row(env, policy.observation_space, rules) for env in envs[:episodes]]
    for row in rows:
        row.begin(next(numbers))
    policy.reset(len(rows))
    while any(row.active for row in rows):
        is_first = np.array([row.steps == 0 for row in rows])
        actions = policy.act(_stack(rows, policy.observation_space), rules.greedy, is_first)
        leaves = flatten(actions, policy.action_space, root="action")
        state = [x.cpu().numpy() for x in policy.state]
        for i, row in enumerate(rows):
            if not row.active:
                continue
            row.remember(_Latents(*(x[i].copy() for x in state)))
            if row.done:
                yield row.episode()
                row.begin(next(numbers, None))
            else:
                one = {key: x[i] for key, x in leaves.items()}
                row.step(unflatten(one, policy.action_space, root="action"))
                on_step()


def _stack(rows: Sequence[_Row], space: gym.Space) -> Any:
    """The current observations of all rows as one batched observation."""
    batch = {key: np.stack([row.obs[-1][key] for row in rows]) for key in rows[0].obs[-1]}
    return unflatten(batch, space)


class _Row:
    """One environment and the episode that goes on in it."""

    def __init__(self, env: gym.Env, space: gym.Space, rules: Rules) -> None:
        self.env, self.space, self.rules = env, space, rules
        self.obs: list[dict[str, Any]] = []

    def begin(self, number: int | None) -> None:
        """Resets for an episode; without a number the row rests on its last observation."""
        self.active = number is not None
        if number is None:
            return
        self.number = number
        self.rewards: list[float] = []
        self.latents: list[_Latents] = []
        self.frames: list[np.ndarray] = []
        self.obs = []
        self.terminated = self.truncated = self.cut = False
        first, info = self.env.reset(seed=self.rules.seed + number)
        self.success = success_of([info])
        self._see(first)

    @property
    def steps(self) -> int:
        return len(self.rewards)

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated or self.cut

    def step(self, action: Any) -> None:
        """One step of the environment."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.rewards.append(float(reward))
        told = success_of([info])
        self.success = self.success if told is None else told or bool(self.success)
        self.terminated, self.truncated = bool(terminated), bool(truncated)
        self.cut = not (terminated or truncated) and self.steps == self.rules.max_steps
        self._see(obs)

    def remember(self, latents: _Latents) -> None:
        self.latents.append(latents)

    def episode(self) -> Episode:
        """The episode that has ended."""
        deter, stoch, actions = (np.stack(parts) for parts in zip(*self.latents, strict=True))
        return Episode(
            index=self.number,
            rewards=np.asarray(self.rewards, np.float32),
            obs={key: np.stack([obs[key] for obs in self.obs]) for key in self.obs[0]},
            deter=deter,
            stoch=stoch,
            actions=actions[:-1],
            terminated=self.terminated,
            cut=self.cut,
            success=self.success,
            frames=np.stack(self.frames) if self.frames else None,
        )

    def _see(self, obs: Any) -> None:
        leaves = {key: np.array(x) for key, x in flatten(obs, self.space).items()}
        self.obs.append(leaves)
        if not self.rules.draw or len(self.frames) >= MAX_FRAMES:
            return
        frame = frame_of(self.env, leaves, self.space)
        if frame is not None:
            self.frames.append(frame)
