"""World model: encoder, RSSM, decoder, reward and continue heads, and its losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rllib_dreamer.model import kernels, nets, ops
from rllib_dreamer.model.distributions import Binary, Noise, TwoHot, two_hot
from rllib_dreamer.model.fuse import native
from rllib_dreamer.model.rssm import RSSM, DenseRSSM, Posterior, State
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ModelConfig


class NativeTwoHot(TwoHot):
    """`TwoHot` by native kernels. `mean` gives no gradient."""

    def __init__(self, logits: Tensor, bins: Tensor) -> None:
        super().__init__(logits.float().contiguous(), bins)
        self.log_sum, self._mean = kernels.two_hot_statistics(self.logits.detach(), bins)

    @property
    def mean(self) -> Tensor:
        """Expected value (...)."""
        return self._mean

    def loss(self, target: Tensor) -> Tensor:
        """Cross-entropy (...) to the two-hot encoding of target (...)."""
        weights = two_hot(target.detach().float(), self.bins)
        return kernels.two_hot_loss(self.logits, self.log_sum, weights)


class TwoHotHead(nn.Module):
    """MLP that predicts a real number through two-hot logits; starts at exactly zero."""

    def __init__(self, in_features: int, layers: int, config: ModelConfig, units: int = 0) -> None:
        super().__init__()
        units = units or config.units
        self.mlp = nets.MLP(in_features, units, layers, config.norm)
        self.out = nets.Linear(units, config.bins, outscale=0.0)
        self.register_buffer("bins", ops.symexp_bins(config.bins), persistent=False)
        self.bins: Tensor

    def forward(self, feat: Tensor) -> TwoHot:
        """(..., F) -> distribution over (...)."""
        logits = self.out(self.mlp(feat))
        return (NativeTwoHot if native(logits) else TwoHot)(logits, self.bins)


class BinaryHead(nn.Module):
    """MLP that predicts the probability of going on."""

    def __init__(self, in_features: int, layers: int, config: ModelConfig, units: int = 0) -> None:
        super().__init__()
        units = units or config.units
        self.mlp = nets.MLP(in_features, units, layers, config.norm)
        self.out = nets.Linear(units, 1)

    def forward(self, feat: Tensor) -> Binary:
        """(..., F) -> distribution over (...)."""
        return Binary(self.out(self.mlp(feat)).squeeze(-1))


class WorldModelOutput(NamedTuple):
    """What one pass over replayed rows gives: latents, features and losses.

    posterior: the filtered states. feat (B, T, F), with gradients into the world model.
    losses: each (B, T). metrics: scalars.
    """

    posterior: Posterior
    feat: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


def encode_action(actions: Mapping[str, Tensor], specs: Mapping[str, ActionSpec]) -> Tensor:
    """Concatenates action leaves in sorted order: one-hot of discrete ones, real ones as they are.

    Args:
        actions: Leaves (..., n). Discrete ones hold class indices from zero on; -1 gives zeros.
        specs: Their specs.

    Returns:
        (..., A) float32.
    """
    parts = []
    for key in sorted(specs):
        x = actions[key]
        if specs[key].kind == "discrete":
            x = ops.one_hot(x.long(), specs[key].classes).flatten(-2)
        parts.append(x.float())
    return ops.concat(parts)


def random_actions(specs: Mapping[str, ActionSpec], n: int, like: Tensor) -> dict[str, Tensor]:
    """Uniform action leaves (n, size) on the device of `like`: class indices, reals in [-1, 1]."""
    actions = {}
    for key, spec in specs.items():
        x = torch.rand(n, spec.size, device=like.device)
        if spec.kind == "discrete":
            limits = spec.limits or (spec.classes,)
            actions[key] = (x * torch.tensor(limits, device=like.device)).long()
        else:
            actions[key] = 2.0 * x - 1.0
    return actions


def kl_losses(
    posterior: Tensor, prior: Tensor, unimix: float, free_nats: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dynamics and representation loss (paper eq. 3) and their metrics, from logits (B, T, S, K).

    dyn = max(free, KL[sg(posterior) || prior]), rep = max(free, KL[posterior || sg(prior)]); the
    free nats apply to each step after summing over the groups.
    """
    log_post = ops.unimix_log_probs(posterior, unimix)
    log_prior = ops.unimix_log_probs(prior, unimix)
    dyn = ops.categorical_kl(log_post.detach(), log_prior)
    rep = ops.categorical_kl(log_post, log_prior.detach())
    losses = {"dyn": dyn.clamp(min=free_nats), "rep": rep.clamp(min=free_nats)}
    with torch.no_grad():
        metrics = {
            "kl": dyn.mean(),
            "posterior_entropy": -(log_post.exp() * log_post).sum((-2, -1)).mean(),
            "prior_entropy": -(log_prior.exp() * log_prior).sum((-2, -1)).mean(),
        }
    return losses, metrics


def observations(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The observation leaves (B, T, ...) of the trained steps of a replay batch."""
    return {k.removeprefix("obs/"): x[:, 1:] for k, x in batch.items() if k.startswith("obs/")}


class WorldModel(nn.Module):
    """Learns what happens next.

    Args:
        encoder: Maps observation leaves (n, ...) to tokens (n, E) and has this width as `embed`.
        decoder: Module that reconstructs the observation leaves in its `images` and `vectors`, from
            latents (n, D), (n, S * K) by `forward(deter, stoch)`; `losses(outputs, obs)` gives a
            loss (n,) for each of these leaves, and `predictions(outputs)`, needed for films and
            reconstruction metrics only, the leaves themselves. None learns without reconstruction.
        actions: Specs of the action leaves.
        config: Architecture.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module | None,
        actions: Mapping[str, ActionSpec],
        config: ModelConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.actions = dict(actions)
        self.encoder = encoder
        rssm = DenseRSSM if config.cell == "gru" else RSSM
        self.rssm = rssm(
            int(cast(int, encoder.embed)), sum(a.width for a in actions.values()), config
        )
        self.decoder: Any = decoder
        self.reward = TwoHotHead(config.feat, config.reward_layers, config, config.reward_units)
        self.cont = BinaryHead(config.feat, config.cont_layers, config, config.cont_units)

    @staticmethod
    def feat(state: State) -> Tensor:
        """Features (..., F): deter first, then the flattened stoch."""
        return torch.cat([state.deter, state.stoch.flatten(-2)], -1)

    def encode(self, obs: Mapping[str, Tensor], rows: int) -> Tensor:
        """Observation leaves (B, T, ...) -> tokens (B, T, E)."""
        flat = {key: x.flatten(0, 1) for key, x in obs.items()}
        return self.encoder(flat).unflatten(0, (rows, -1))

    def filter(self, batch: Mapping[str, Tensor], steps: int, noise: Noise) -> Posterior:
        """The posterior (B, steps, ...) of the first trained steps of a replay batch."""
        obs = {key: x[:, :steps] for key, x in observations(batch).items()}
        actions = {key: batch[f"action/{key}"][:, :steps] for key in self.actions}
        return self.rssm.observe(
            self.rssm.state(batch["deter"][:, 0], batch["stoch"][:, 0]),
            encode_action(actions, self.actions),
            self.encode(obs, batch["reward"].shape[0]),
            batch["is_first"][:, 1 : steps + 1],
            noise,
        )

    def forward(
        self, batch: Mapping[str, Tensor], loss: LossConfig, noise: Noise
    ) -> WorldModelOutput:
        """Filters a replay batch, laid out as `rllib_dreamer.model` says; computes every loss."""
        posterior = self.filter(batch, batch["reward"].shape[1] - 1, noise)
        feat = self.feat(State(posterior.deter, posterior.stoch))  # (B, T, F)
        losses, metrics = kl_losses(
            posterior.logits,
            self.rssm.prior_logits(posterior.deter),
            self.config.unimix,
            loss.free_nats,
        )
        losses |= self._reconstruction(posterior, batch)
        reward = batch["reward"][:, 1:]
        reward_head = self.reward(feat)
        losses["reward"] = reward_head.loss(reward)
        losses["cont"] = self.cont(feat).loss(
            (1.0 - batch["is_terminal"][:, 1:].float()) * loss.discount
        )
        with torch.no_grad():
            metrics["reward_error"] = (reward_head.mean - reward).abs().mean()
            metrics["reward_mean"] = reward.float().mean()
        return WorldModelOutput(posterior, feat, losses, metrics)

    def _reconstruction(
        self, posterior: Posterior, batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Loss (B, T) of each decoded leaf."""
        if self.decoder is None:
            return {}
        rows = posterior.deter.shape[0]
        deter, stoch = posterior.deter.flatten(0, 1), posterior.stoch.flatten(0, 1).flatten(1)
        outputs = self.decoder(deter, stoch)
        obs = {key: x.flatten(0, 1) for key, x in observations(batch).items()}
        losses = self.decoder.losses(outputs, obs)
        return {key: x.unflatten(0, (rows, -1)) for key, x in losses.items()}
