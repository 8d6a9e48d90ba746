"""The whole agent: world model and behavior, one forward pass to every loss, and acting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rllib_dreamer.model.behavior import Behavior
from rllib_dreamer.model.codec import Decoder, Encoder
from rllib_dreamer.model.distributions import Noise, RandomNoise
from rllib_dreamer.model.fuse import fusing
from rllib_dreamer.model.rssm import State
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ModelConfig, ObsSpec
from rllib_dreamer.model.world_model import WorldModel, encode_action, random_actions


class AgentOutput(NamedTuple):
    """What one training pass gives.

    losses: unscaled terms, (B, T) or shaped as in `Behavior`. deter (B, T, D) and stoch (B, T, S)
    class indices: the latents to write back to replay. metrics: scalar tensors.
    """

    losses: dict[str, Tensor]
    deter: Tensor
    stoch: Tensor
    metrics: dict[str, Tensor]


class ActState(NamedTuple):
    """Recurrent state of acting: deter (n, D), stoch (n, S) class indices, action (n, A) encoded.

    A stoch of -1 is the zero state, what an episode begins with.
    """

    deter: Tensor
    stoch: Tensor
    action: Tensor


class Agent(nn.Module):
    """DreamerV3.

    Args:
        world: The world model.
        behavior: Actor and critic.
        loss: Constants of the losses.
        dtype: Compute type of matrix products and convolutions; parameters, norms' statistics,
            distributions and losses are float32 throughout. With native kernels, on a CPU, the
            recurrent filter of a training pass is float32 too.
    """

    LEARNING_PARTS = (
        "world.rssm.prior",
        "world.rssm.prior_out",
        "world.decoder",
        "world.reward",
        "world.cont",
        "behavior.critic",
        "behavior.slow_critic",
        "behavior.normalizer",
    )

    def __init__(
        self,
        world: WorldModel,
        behavior: Behavior,
        loss: LossConfig,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.world, self.behavior = world, behavior
        self.loss, self.dtype = loss, dtype
        self.fuse = False
        self.noise: Noise = RandomNoise()

    @property
    def scales(self) -> dict[str, float]:
        """Weight of each loss term; every decoded leaf has the scale `rec`."""
        scales = dict(self.loss.scales)
        rec = scales.pop("rec")
        decoder = self.world.decoder
        leaves = [] if decoder is None else [*decoder.images, *decoder.vectors]
        return {key: rec for key in leaves} | scales

    def autocast(self, device: torch.device) -> torch.autocast:
        """Context in which matrix products run in the compute type."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def forward(self, batch: Mapping[str, Tensor]) -> AgentOutput:
        """One pass over a replay batch: every loss, on one graph, for one backward."""
        with fusing(self.fuse), self.autocast(batch["reward"].device):
            world = self.world(batch, self.loss, self.noise)
            posterior = world.posterior
            start = State(posterior.deter.flatten(0, 1), posterior.stoch.flatten(0, 1))
            behavior = self.behavior(self.world, start, world.feat, batch, self.noise)
        losses = world.losses | behavior.losses
        metrics = world.metrics | behavior.metrics
        return AgentOutput(losses, posterior.deter.detach(), posterior.index, metrics)

    def keep_acting_parts(self) -> None:
        """Drops what only learning needs: prior, decoder, reward and continue heads, critics."""
        for path in self.LEARNING_PARTS:
            owner, name = path.rsplit(".", 1)
            setattr(self.get_submodule(owner), name, None)

    def initial_state(self, n: int, device: torch.device | str = "cpu") -> ActState:
        """The state before an episode's first observation."""
        c = self.world.config
        width = sum(spec.width for spec in self.world.actions.values())
        return ActState(
            torch.zeros(n, c.deter, device=device),
            torch.full((n, c.stoch), -1, dtype=torch.int16, device=device),
            torch.zeros(n, width, device=device),
        )

    @torch.no_grad()
    def act(
        self, obs: Mapping[str, Tensor], state: ActState, explore: bool, random: bool = False
    ) -> tuple[dict[str, Tensor], ActState]:
        """One step of the policy.

        Args:
            obs: Observation leaves (n, ...).
            state: From `initial_state` or the previous call.
            explore: Samples the action; else its mode or mean.
            random: Draws the action uniformly instead, without the actor.

        Returns:
            Action leaves (n, size) and the next state.
        """
        rssm = self.world.rssm
        tokens = self.world.encoder(obs)
        carry = rssm.state(state.deter, state.stoch)
        uniform = self.noise.uniform((tokens.shape[0], rssm.config.stoch), tokens.device)
        action = rssm.prepare_action(state.action)
        carry, index, _ = rssm.observe_step(carry, action, tokens, uniform)
        dists = self.behavior.actor(self.world.feat(carry))
        if random:
            actions = random_actions(self.world.actions, tokens.shape[0], tokens)
        else:
            actions = {k: d.sample(self.noise) if explore else d.mode() for k, d in dists.items()}
        encoded = encode_action(actions, self.world.actions)
        return actions, ActState(carry.deter, index.to(torch.int16), encoded)


def build_agent(
    obs: Mapping[str, ObsSpec],
    actions: Mapping[str, ActionSpec],
    config: ModelConfig,
    loss: LossConfig,
    dtype: torch.dtype = torch.float32,
) -> Agent:
    """The standard agent for these observation and action leaves."""
    world = WorldModel(Encoder(obs, config), Decoder(obs, config), actions, config)
    return Agent(world, Behavior(actions, config, loss), loss, dtype)
