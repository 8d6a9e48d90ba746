"""Tests of rllib_dreamer.model.nets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rllib_dreamer.model import nets
from rllib_dreamer.model.agent import build_agent
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ObsSpec, model_config

KINDS = {
    "linear": lambda: nets.Linear(700, 500),
    "block_linear": lambda: nets.BlockLinear(2400, 960, 8),
    "conv": lambda: nets.Conv(48, 96),
}


@pytest.fixture(scope="module")
def units(units_path: Path) -> dict[str, Tensor]:
    """Single layers of the official code."""
    with np.load(units_path) as file:
        names = ("linear/", "block_linear/", "conv/", "mlp/", "init/")
        return {k: torch.from_numpy(np.array(file[k])) for k in file.files if k.startswith(names)}


def load_(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Gives a layer its weight and bias."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Sums of at most 75 float32 products."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_linear_is_the_official_one(units: dict[str, Tensor]) -> None:
    layer = nets.Linear(5, 7)
    load_(layer, units["linear/param/kernel"].T, units["linear/param/bias"])
    close(layer(units["linear/in"]), units["linear/out"])


def test_block_linear_is_the_official_one(units: dict[str, Tensor]) -> None:
    layer = nets.BlockLinear(20, 24, 4)
    load_(layer, units["block_linear/param/kernel"], units["block_linear/param/bias"])
    close(layer(units["block_linear/in"]), units["block_linear/out"])


def test_block_k_maps_slice_k() -> None:
    layer = nets.BlockLinear(6, 4, 2)
    x = torch.zeros(1, 6)
    x[0, 3:] = 1.0  # the second slice only
    y = layer(x)
    assert y[0, :2].count_nonzero() == 0
    close(y[0, 2:], layer.weight[1].sum(0))


def test_conv_is_the_official_one(units: dict[str, Tensor]) -> None:
    layer = nets.Conv(3, 6)
    load_(layer, units["conv/param/kernel"].permute(3, 2, 0, 1), units["conv/param/bias"])
    ours = layer(units["conv/in"].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    close(ours, units["conv/out"])


def test_mlp_is_the_official_one(units: dict[str, Tensor]) -> None:
    mlp = nets.MLP(6, 10, 3)
    for i, layer in enumerate(mlp):
        path = f"mlp/param/linear{i}"
        load_(layer.linear, units[f"{path}/kernel"].T, units[f"{path}/bias"])
        with torch.no_grad():
            layer.norm.scale.copy_(units[f"mlp/param/norm{i}/scale"])
    close(mlp(units["mlp/in"]), units["mlp/out"])


@pytest.mark.parametrize("kind", KINDS)
def test_initialiser_has_the_official_statistics(units: dict[str, Tensor], kind: str) -> None:
    """Truncated normal on two deviations; the fan-in of a block-linear layer is the whole input.

    A third of a million numbers: the deviation is known to 0.2 %.
    """
    torch.manual_seed(0)
    layer = KINDS[kind]()
    fan_in = units[f"init/{kind}/fan_in"].item()
    assert layer.weight.numel() >= 100_000
    assert layer.weight.std().item() * math.sqrt(fan_in) == pytest.approx(1.0, abs=0.006)
    assert layer.weight.std().item() == pytest.approx(units[f"init/{kind}/std"].item(), rel=0.006)
    bound = units[f"init/{kind}/bound"].item()
    assert 0.99 * bound < layer.weight.abs().max().item() <= 1.0001 * bound
    assert layer.weight.mean().abs().item() < 0.01 * layer.weight.std().item()
    assert layer.bias.count_nonzero() == 0


def test_outscale() -> None:
    torch.manual_seed(0)
    small = nets.Linear(400, 400, outscale=0.01)
    assert small.weight.std().item() * 20 == pytest.approx(0.01, rel=0.01)
    assert nets.Linear(4, 4, outscale=0.0).weight.count_nonzero() == 0
    assert nets.RMSNorm(3).scale.tolist() == [1.0, 1.0, 1.0]


def test_an_untrained_agent_has_zero_heads_and_an_undecided_actor() -> None:
    specs = {"vector": ObsSpec("vector", (3,))}
    agent = build_agent(
        specs, {"action": ActionSpec("continuous", 2)}, model_config("1M"), LossConfig()
    )
    feat = torch.randn(5, agent.world.config.feat)
    assert agent.world.reward(feat).mean.count_nonzero() == 0
    assert agent.behavior.critic(feat).mean.count_nonzero() == 0
    assert agent.behavior.slow_critic(feat).mean.count_nonzero() == 0
    dist = agent.behavior.actor(feat)["action"]
    assert dist.mean.abs().max() < 0.1
    torch.testing.assert_close(dist.std, torch.full_like(dist.std, 0.893), rtol=0.02, atol=0)
    for name, param in agent.named_parameters():
        if name.endswith("bias"):
            assert param.count_nonzero() == 0, name
        elif name.endswith("scale"):
            assert (param == 1).all(), name
