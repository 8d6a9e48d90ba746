"""Behavior learning: actor, critic, imagination, returns and their losses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from rllib_dreamer.model import nets, ops
from rllib_dreamer.model.codec import module_name
from rllib_dreamer.model.distributions import BoundedNormal, Categorical, Noise, TanhNormal
from rllib_dreamer.model.fuse import fusing
from rllib_dreamer.model.rssm import State
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ModelConfig
from rllib_dreamer.model.world_model import TwoHotHead, WorldModel, encode_action

ActionDist = BoundedNormal | TanhNormal | Categorical


class Actor(nn.Module):
    """Policy: one MLP, one head (or a pair) for each action leaf."""

    def __init__(self, specs: Mapping[str, ActionSpec], config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.specs = dict(sorted(specs.items()))
        units = config.actor_units or config.units
        self.mlp = nets.MLP(config.feat, units, config.actor_layers, config.norm)
        self.heads = nn.ModuleDict()
        for key, spec in self.specs.items():
            outputs = ["logits"] if spec.kind == "discrete" else ["mean", "std"]
            head = nn.ModuleDict(
                {name: nets.Linear(units, spec.width, outscale=0.01) for name in outputs}
            )
            head.register_buffer("valid", _valid(spec), persistent=False)
            self.heads[module_name(key)] = head

    def forward(self, feat: Tensor) -> dict[str, ActionDist]:
        """(..., F) -> a distribution for each action leaf."""
        x = self.mlp(feat)
        normal = TanhNormal if self.config.actor_dist == "tanh_normal" else BoundedNormal
        dists: dict[str, ActionDist] = {}
        for key, spec in self.specs.items():
            head = self.heads[module_name(key)]
            assert isinstance(head, nn.ModuleDict)
            if spec.kind == "discrete":
                logits = head["logits"](x).unflatten(-1, (spec.size, spec.classes))
                valid = cast("Tensor | None", head.valid)
                dists[key] = Categorical(logits, self.config.actor_unimix, valid, spec.limits)
            else:
                dists[key] = normal(
                    head["mean"](x), head["std"](x), self.config.min_std, self.config.max_std
                )
        return dists


def _valid(spec: ActionSpec) -> Tensor | None:
    """(n, K) True for the classes that each component has; None if all have all."""
    if not spec.limits:
        return None
    return torch.arange(spec.classes) < torch.tensor(spec.limits).unsqueeze(-1)


class Trajectory(NamedTuple):
    """Imagined trajectories: feat (N, H + 1, F) and action leaves (N, H + 1, n), no gradients."""

    feat: Tensor
    actions: dict[str, Tensor]


class ReturnNormalizer(nn.Module):
    """Running range between two percentiles of the returns (official `Normalize('perc')`).

    x <- (1 - rate) * x + rate * percentile, from zero and without debiasing; moved before use.
    """

    def __init__(self, loss: LossConfig) -> None:
        super().__init__()
        self.rate, self.limit = loss.return_rate, loss.return_limit
        self.percentiles = loss.return_percentiles
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.low: Tensor
        self.high: Tensor

    @torch.no_grad()
    def update(self, returns: Tensor) -> Tensor:
        """Moves the range by these returns (any shape); gives the scale max(limit, high - low)."""
        low, high = ops.percentiles(returns, *self.percentiles)
        finite = torch.isfinite(low) & torch.isfinite(high)  # a diverged update must not stay
        self.low.copy_(torch.where(finite, torch.lerp(self.low, low, self.rate), self.low))
        self.high.copy_(torch.where(finite, torch.lerp(self.high, high, self.rate), self.high))
        return self.scale()

    def scale(self) -> Tensor:
        """max(limit, high - low)."""
        return (self.high - self.low).clamp(min=self.limit)


@contextlib.contextmanager
def constant(*modules: nn.Module) -> Iterator[None]:
    """Within this context parameters of the modules are constants: no gradient is to reach them."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


class BehaviorOutput(NamedTuple):
    """losses: actor (N, H), critic (N, H), repval (B, T - 1). metrics: scalars."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Behavior(nn.Module):
    """Actor, critic and slow critic, learned in imagination and, the critic, on replay too.

    `gather` collects returns from every learner before their percentiles are taken; whoever runs
    several learners sets it.

    Raises:
        ValueError: If `actor_grad` is "dynamics" and an action is discrete.
    """

    def __init__(
        self, actions: Mapping[str, ActionSpec], config: ModelConfig, loss: LossConfig
    ) -> None:
        super().__init__()
        discrete = sorted(key for key, spec in actions.items() if spec.kind == "discrete")
        if loss.actor_grad == "dynamics" and discrete:
            raise ValueError(
                f"actor_grad='dynamics' needs continuous actions, but {discrete} are discrete and "
                "have no gradient: use actor_grad='reinforce'."
            )
        self.loss = loss
        self.actor = Actor(actions, config)
        self.critic = TwoHotHead(config.feat, config.critic_layers, config, config.critic_units)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.normalizer = ReturnNormalizer(loss)
        self.gather: ops.Gather = alone

    @torch.no_grad()
    def imagine(self, world: WorldModel, start: State, noise: Noise) -> Trajectory:
        """Rolls the policy out under the prior for H steps from starts (N, D), (N, S, K)."""
        horizon, (n, stoch) = self.loss.horizon, start.stoch.shape[:2]
        uniform = noise.uniform((horizon, n, stoch), start.deter.device)
        first, actions = world.feat(start), []
        feat = first.new_empty(n, horizon + 1, first.shape[1])
        feat[:, 0] = first
        step = world.rssm.transition(n)
        for i in range(horizon + 1):
            action = {key: dist.sample(noise) for key, dist in self.actor(feat[:, i]).items()}
            actions.append(action)
            if i < horizon:
                encoded = encode_action(action, self.actor.specs)
                step(feat[:, i], encoded, None if uniform is None else uniform[i], feat[:, i + 1])
        return Trajectory(feat, {k: torch.stack([a[k] for a in actions], 1) for k in actions[0]})

    def imagine_through(
        self, world: WorldModel, start: State, noise: Noise
    ) -> tuple[Trajectory, Tensor]:
        """Does `imagine` and gives the returns (N, H) with gradients to the actor through dynamics.

        Gradients run from rewards, discounts and values along the trajectory to every action, and
        from there into the actor, which reads features without gradient. World model and critic
        are constants. Native kernels have no such backward and are not used.
        """
        horizon, (n, stoch) = self.loss.horizon, start.stoch.shape[:2]
        uniform = noise.uniform((horizon, n, stoch), start.deter.device)
        state, feats, actions = start, [world.feat(start)], []
        with constant(world, self.critic), fusing(False):
            for i in range(horizon + 1):
                dists = self.actor(feats[-1].detach())
                actions.append({key: dist.sample(noise) for key, dist in dists.items()})
                if i < horizon:
                    encoded = encode_action(actions[-1], self.actor.specs)
                    draw = None if uniform is None else uniform[i]
                    state = world.rssm.imagine_step(state, encoded, draw)
                    feats.append(world.feat(state))
            feat = torch.stack(feats, 1)  # (N, H + 1, F)
            returns = ops.lambda_return(
                world.reward(feat).mean,
                world.cont(feat).prob(),
                self.critic(feat).mean,
                self.loss.lam,
            )  # (N, H)
        leaves = {k: torch.stack([a[k].detach() for a in actions], 1) for k in actions[0]}
        return Trajectory(feat.detach(), leaves), returns

    def forward(
        self,
        world: WorldModel,
        start: State,
        feat: Tensor,
        batch: Mapping[str, Tensor],
        noise: Noise,
    ) -> BehaviorOutput:
        """Computes the losses of actor and critic.

        Args:
            world: The world model, used without gradients.
            start: Replayed posterior states (N, D), (N, S, K).
            feat: Replayed features (B, T, F), with gradients into the world model.
            batch: The replay batch.
            noise: Source of randomness.
        """
        start, dynamics_returns = State(*(x.detach() for x in start)), None
        if self.loss.actor_grad == "dynamics":
            trajectory, dynamics_returns = self.imagine_through(world, start, noise)
        else:
            trajectory = self.imagine(world, start, noise)
            torch.clear_autocast_cache()  # torch < 2.10 would reuse casts that have no gradient
        compute = nets.compute_dtype(start.deter.device)
        trajectory = trajectory._replace(feat=trajectory.feat.to(compute))  # once for all heads
        with torch.no_grad():
            reward = world.reward(trajectory.feat).mean  # (N, H + 1)
            cont = world.cont(trajectory.feat).prob()  # (N, H + 1)
            slow_value = self.slow_critic(trajectory.feat).mean  # (N, H + 1)
        value_dist = self.critic(trajectory.feat)
        value = value_dist.mean.detach()  # (N, H + 1)
        returns = ops.lambda_return(reward, cont, value, self.loss.lam)  # (N, H)
        scale = self.normalizer.update(self.gather(returns))
        weight = cont.cumprod(1)[:, :-1]  # (N, H)
        actor_returns = returns if dynamics_returns is None else dynamics_returns
        advantage = (actor_returns - value[:, :-1]) / scale
        actor_loss, metrics = self._actor_loss(trajectory, advantage, weight, noise)
        critic_loss = value_dist.loss(pad_last(returns)) + (
            self.loss.slow_regularization * value_dist.loss(slow_value)
        )
        losses = {"actor": actor_loss, "critic": weight * critic_loss[:, :-1]}
        losses["repval"] = self._replay_value_loss(feat, batch, returns[:, 0])
        metrics |= {
            "return_mean": returns.mean(),
            "return_scale": scale,
            "return_low": self.normalizer.low,
            "return_high": self.normalizer.high,
            "return_rate": (returns.abs() >= 1.0).float().mean(),
            "value_mean": value.mean(),
            "value_error": (returns - value[:, :-1]).abs().mean(),
            "slow_value_mean": slow_value.mean(),
            "imagined_reward_mean": reward[:, 1:].mean(),
            "imagined_cont_mean": cont[:, 1:].mean(),
            "weight_mean": weight.mean(),
            "advantage_mean": advantage.mean(),
            "advantage_std": advantage.std(),
            "advantage_magnitude": advantage.abs().mean(),
        }
        return BehaviorOutput(losses, {key: x.detach() for key, x in metrics.items()})

    def _actor_loss(
        self, trajectory: Trajectory, advantage: Tensor, weight: Tensor, noise: Noise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """REINFORCE with an entropy bonus (paper eq. 6), (N, H), for every kind of action.

        With `actor_grad="dynamics"` the advantage brings its own gradient.
        """
        dists = self.actor(trajectory.feat)  # the last state too: cheaper than to copy the others
        gain = advantage
        if self.loss.actor_grad == "reinforce":
            log_probs = [dist.log_prob(trajectory.actions[key]) for key, dist in dists.items()]
            gain = sum(log_probs)[:, :-1] * advantage
        entropy = sum(dist.entropy(noise) for dist in dists.values())[:, :-1]
        loss = -weight * (gain + self.loss.entropy_scale * entropy)
        ceiling = sum(dist.max_entropy() for dist in dists.values())
        metrics = {"actor_entropy": entropy.mean()}
        if ceiling > 0:  # there is anything to choose, and the widest normal is not a narrow one
            metrics["actor_randomness"] = entropy.mean() / ceiling
        return loss, metrics

    def _replay_value_loss(self, feat: Tensor, batch: Mapping[str, Tensor], boot: Tensor) -> Tensor:
        """Critic loss on replayed states (B, T - 1), which also trains encoder and RSSM."""
        rows = feat.shape[0]
        last = batch["is_last"][:, 1:]
        returns = ops.replay_return(
            batch["reward"][:, 1:].float(),
            last,
            batch["is_terminal"][:, 1:],
            boot.unflatten(0, (rows, -1)),
            self.loss.discount,
            self.loss.lam,
        )  # (B, T - 1)
        dist = self.critic(feat)
        with torch.no_grad():
            slow_value = self.slow_critic(feat).mean  # (B, T)
        loss = dist.loss(pad_last(returns)) + self.loss.slow_regularization * dist.loss(slow_value)
        return (1.0 - last[:, :-1].float()) * loss[:, :-1]

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """Moves slow <- rate * critic + (1 - rate) * slow, after every update."""
        slow: list[Tensor] = list(self.slow_critic.parameters())
        fast: list[Tensor] = list(self.critic.parameters())
        torch._foreach_lerp_(slow, fast, self.loss.slow_rate)


def alone(returns: Tensor) -> Tensor:
    """The returns of all learners, where there is one."""
    return returns


def pad_last(x: Tensor) -> Tensor:
    """Repeats the last column, (n, H) -> (n, H + 1), for a target that the last state ignores."""
    return torch.cat([x, x[:, -1:]], 1)
