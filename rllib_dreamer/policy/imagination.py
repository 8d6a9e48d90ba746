"""Looking into a world model: filtered states, imagined futures, and what they decode to.

Pure PyTorch on the public parts of an `Agent`; shapes as in the legend of `rllib_dreamer.model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.distributions import Noise
from rllib_dreamer.model.rssm import State
from rllib_dreamer.model.world_model import encode_action

CONTEXT = 5
"""Observed steps at the beginning of an open loop, in evaluations and in films of a training."""

AT_ONCE = 64
"""States that go through a head or the decoder together: bounds the memory of activations."""


class Prediction(NamedTuple):
    """What states stand for.

    obs: the `decoded_leaves` (B, T, ...): pixels as floats in [0, 1], vectors in their units, class
    indices.
    reward (B, T) in reward units. cont (B, T) probability of going on, in [0, 1].
    """

    obs: dict[str, Tensor]
    reward: Tensor
    cont: Tensor


@torch.no_grad()
def observe(agent: Agent, obs: Mapping[str, Tensor], actions: Tensor, noise: Noise) -> State:
    """Filters the beginning of an episode.

    Args:
        agent: The agent.
        obs: Observation leaves (B, T, ...) in the model's form, the first one after a reset.
        actions: Encoded actions between them (B, T - 1, A).
        noise: Source of randomness.

    Returns:
        The posterior states, deter (B, T, D) and stoch (B, T, S, K).
    """
    world = agent.world
    rows = next(iter(obs.values())).shape[0]
    tokens = world.encode(obs, rows)  # (B, T, E)
    before = torch.cat([actions.new_zeros(rows, 1, actions.shape[2]), actions], 1)  # (B, T, A)
    is_first = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    is_first[:, 0] = True
    start = world.rssm.initial(rows, tokens.device)
    posterior = world.rssm.observe(start, before, tokens, is_first, noise)
    return State(posterior.deter, posterior.stoch)


@torch.no_grad()
def roll_out(agent: Agent, start: State, actions: Tensor, noise: Noise) -> State:
    """Imagines what given actions lead to, under the prior and without observations.

    Args:
        agent: The agent.
        start: States (B, D), (B, S, K).
        actions: Encoded actions (B, H, A), the first one taken in the start.
        noise: Source of randomness.

    Returns:
        The H states after the start, deter (B, H, D) and stoch (B, H, S, K).
    """
    rssm = agent.world.rssm
    rows, horizon = actions.shape[:2]
    uniform = noise.uniform((horizon, rows, rssm.config.stoch), actions.device)
    state, states = start, []
    for i in range(horizon):
        state = rssm.imagine_step(state, actions[:, i], None if uniform is None else uniform[i])
        states.append(state)
    return State(*(torch.stack(parts, 1) for parts in zip(*states, strict=True)))


@torch.no_grad()
def open_loop(
    agent: Agent, batch: Mapping[str, Tensor], context: int, noise: Noise
) -> dict[str, Tensor]:
    """Filters the beginning of replayed rows, imagines the rest with their actions, and decodes.

    Args:
        agent: The agent.
        batch: A replay batch (B, T + 1, ...) in the model's form, see the legend for its layout.
        context: Steps to filter, 1 to T - 1.
        noise: Source of randomness.

    Returns:
        Observation leaves (B, T, ...) of steps 1 to T; see `Prediction`.
    """
    world = agent.world
    posterior = world.filter(batch, context, noise)
    leaves = {key: batch[f"action/{key}"][:, context:-1] for key in world.actions}
    actions = encode_action(leaves, world.actions)  # (B, T - context, A)
    filtered = State(posterior.deter, posterior.stoch)
    start = State(filtered.deter[:, -1], filtered.stoch[:, -1])
    future = roll_out(agent, start, actions, noise)
    return decode(agent, State(*(torch.cat(x, 1) for x in zip(filtered, future, strict=True))))


def pixels(frames: Tensor) -> Tensor:
    """Decoded pixels in [0, 1] as uint8."""
    return (255.0 * frames + 0.5).clamp(0.0, 255.0).to(torch.uint8)


@torch.no_grad()
def predict_heads(agent: Agent, states: State) -> tuple[Tensor, Tensor]:
    """Reward and probability of going on of states (..., D), (..., S, K), both (...).

    The discount (`gamma`) that the continue head is trained on is divided out.
    """
    feat = agent.world.feat(states)
    cont = agent.world.cont(feat).prob() / agent.loss.discount
    return agent.world.reward(feat).mean, cont.clamp(max=1.0)


def decoded_leaves(agent: Agent) -> frozenset[str]:
    """Observation leaves that `decode` gives: none without a decoder that has `predictions`."""
    decoder: Any = agent.world.decoder
    if not hasattr(decoder, "predictions"):
        return frozenset()
    return frozenset((*decoder.images, *decoder.vectors))


@torch.no_grad()
def decode(agent: Agent, states: State) -> dict[str, Tensor]:
    """The `decoded_leaves` (B, T, ...) of states (B, T, D), (B, T, S, K); see `Prediction`."""
    if not decoded_leaves(agent):
        return {}
    decoder: Any = agent.world.decoder
    deter = states.deter.flatten(0, 1)  # (B * T, D)
    stoch = states.stoch.flatten(0, 1).flatten(1)  # (B * T, S * K)
    parts: list[dict[str, Tensor]] = [
        decoder.predictions(decoder(*chunk))
        for chunk in zip(deter.split(AT_ONCE), stoch.split(AT_ONCE), strict=True)
    ]
    rows = states.deter.shape[0]
    return {k: torch.cat([p[k] for p in parts]).unflatten(0, (rows, -1)) for k in parts[0]}


def predict(agent: Agent, states: State) -> Prediction:
    """Everything that states (B, T, D), (B, T, S, K) stand for."""
    reward, cont = predict_heads(agent, states)
    return Prediction(decode(agent, states), reward, cont)
