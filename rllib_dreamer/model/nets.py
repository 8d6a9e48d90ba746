"""Layers: linear -> norm -> SiLU, block-linear, MLP and conv stages, with the official init."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from rllib_dreamer.model import ops


@torch.no_grad()
def init_(weight: Tensor, fan_in: int, outscale: float = 1.0) -> Tensor:
    """Truncated normal on two deviations, scaled by sqrt(1 / fan_in) * outscale, in place.

    (official initialiser `trunc_normal_in`.) `outscale=0` gives exact zeros.
    """
    if outscale == 0.0:
        return weight.zero_()
    nn.init.trunc_normal_(weight, 0.0, 1.0, -2.0, 2.0)
    return weight.mul_(ops.TRUNC_NORMAL_SCALE * outscale / math.sqrt(fan_in))


class Linear(nn.Linear):
    """Linear layer with the official initialisation; the bias starts at zero."""

    def __init__(self, in_features: int, out_features: int, outscale: float = 1.0) -> None:
        self.outscale = outscale
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Draws the weight, zeroes the bias."""
        init_(self.weight, self.in_features, self.outscale)
        nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """Block-diagonal linear layer: G slices of the input, one small dense layer for each.

    Slice g of the input (..., in/G) maps to slice g of the output (..., out/G). The fan-in used by
    the initialiser is the *whole* input width, as in the official code.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__()
        assert in_features % blocks == 0 and out_features % blocks == 0
        self.in_features, self.blocks = in_features, blocks
        self.weight = nn.Parameter(
            torch.empty(blocks, in_features // blocks, out_features // blocks)
        )
        self.bias = nn.Parameter(torch.zeros(out_features))
        init_(self.weight, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""
        n = x.shape[0]
        x = x.reshape(n, self.blocks, -1).transpose(0, 1)  # (G, n, in/G)
        y = torch.bmm(x, self.weight).transpose(0, 1)  # (n, G, out/G)
        return y.reshape(n, -1) + self.bias


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale and no shift; eps 1e-4."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> the same."""
        return ops.rms_norm(x, self.scale)


class Layer(nn.Module):
    """Linear (with bias) -> norm -> SiLU."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = Linear(in_features, out_features)
        self.norm = RMSNorm(out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return ops.norm_silu(self.linear(x), self.norm.scale)


class MLP(nn.Sequential):
    """`layers` layers of `units`."""

    def __init__(self, in_features: int, units: int, layers: int) -> None:
        widths = [in_features] + [units] * layers
        super().__init__(*(Layer(a, b) for a, b in itertools.pairwise(widths)))


class Conv(nn.Conv2d):
    """Stride-1 SAME convolution with the official initialisation."""

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int, outscale: float = 1.0):
        self.outscale = outscale
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)

    def reset_parameters(self) -> None:
        """Draws the kernel, zeroes the bias."""
        init_(self.weight, self.weight[0].numel(), self.outscale)
        nn.init.zeros_(self.bias)
