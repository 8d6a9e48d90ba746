"""A tiny agent of the classic variant, and a batch for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rllib_dreamer.model import ops
from rllib_dreamer.model.agent import Agent, build_agent
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.model.rssm import State
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ObsSpec, model_config

TINY = {
    "deter": 16,
    "hidden": 12,
    "stoch": 3,
    "classes": 4,
    "depth": 2,
    "units": 10,
    "bins": 41,
    "mults": (1, 2, 3, 4),
    "decoder_blocks": 1,
    "cell": "gru",
    "norm": "layer",
    "downsample": "stride",
    "embed": 14,
    "actor_dist": "tanh_normal",
    "reward_units": 9,
    "cont_units": 8,
    "actor_units": 7,
    "critic_units": 6,
}
B, T, H = 2, 4, 3


def tiny_agent(actor_grad: str = "dynamics", **overrides: Any) -> Agent:
    """A small classic agent, its output layers away from zero so that values differ."""
    torch.manual_seed(3)
    agent = build_agent(
        {"image": ObsSpec("image", (32, 32, 3))},
        {"action": ActionSpec("continuous", 2)},
        model_config("1M", **{**TINY, **overrides}),
        LossConfig(horizon=H, actor_grad=actor_grad),
    )
    with torch.no_grad():
        for param in agent.parameters():
            param.add_(0.1 * torch.randn_like(param))
        span = torch.linspace(-1.0, 1.0, 41)
        for head in (agent.world.reward, agent.behavior.critic):
            head.out.bias.copy_(-30.0 * span.square())  # small returns
    agent.noise = FixedNoise(0.4)
    return agent


def tiny_batch() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    lead = (B, T + 1)
    batch = {name: torch.zeros(lead, dtype=torch.bool) for name in ("is_last", "is_terminal")}
    return batch | {
        "obs/image": torch.randint(0, 256, (*lead, 32, 32, 3), generator=rng, dtype=torch.uint8),
        "action/action": torch.rand(*lead, 2, generator=rng) * 2 - 1,
        "reward": torch.randn(lead, generator=rng),
        "is_first": torch.zeros(lead, dtype=torch.bool),
        "deter": torch.randn(*lead, 16, generator=rng).half(),
        "stoch": torch.randint(0, 4, (*lead, 3), generator=rng).to(torch.uint8),
    }


def gradients(agent: Agent, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter that the loss reaches."""
    params = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {k: g for k, g in zip(params, found, strict=True) if g is not None and g.any()}


def start_state(agent: Agent, rows: int = 5) -> State:
    generator = torch.Generator().manual_seed(5)
    c = agent.world.config
    index = torch.randint(0, c.classes, (rows, c.stoch), generator=generator)
    return State(torch.randn(rows, c.deter, generator=generator), ops.one_hot(index, c.classes))
