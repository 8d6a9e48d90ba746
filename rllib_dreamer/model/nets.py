"""Layers: linear -> norm -> SiLU, block-linear and MLP, with the official init."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rllib_dreamer.model import ops


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type that the products of layers run in, here and now: autocast's, or float32."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.float32


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

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the norm, (..., features) -> the same."""
        return ops.norm_silu(x, self.scale)

    def pool_silu(self, x: Tensor) -> Tensor:
        """2x2 max pool, norm, SiLU: (n, h, w, C) -> (n, h / 2, w / 2, C)."""
        return ops.pool_norm_silu(x, self.scale)

    def phase_silu(self, x: Tensor) -> Tensor:
        """Phases of `ops.upsample_conv`, norm, SiLU: (n, h, w, 4 * C) -> (n, 2h, 2w, C)."""
        return ops.phase_norm_silu(x, self.scale)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with a learned scale and shift, in float32; eps 1e-3.

    (the norm of the first DreamerV3.) It has the forms of `RMSNorm`, none of them fused.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> the same."""
        normed = F.layer_norm(x.float(), x.shape[-1:], self.scale, self.shift, 1e-3)
        return normed.to(x.dtype)

    def silu(self, x: Tensor) -> Tensor:
        """As `RMSNorm.silu`."""
        return F.silu(self(x))

    def pool_silu(self, x: Tensor) -> Tensor:
        """As `RMSNorm.pool_silu`."""
        return self.silu(F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))

    def phase_silu(self, x: Tensor) -> Tensor:
        """As `RMSNorm.phase_silu`."""
        return self.silu(ops.place_phases(x))


Norm = RMSNorm | LayerNorm


def make_norm(features: int, norm: str) -> Norm:
    """The norm of this name, "rms" or "layer"."""
    return LayerNorm(features) if norm == "layer" else RMSNorm(features)


class Layer(nn.Module):
    """Linear (with bias) -> norm -> SiLU."""

    def __init__(self, in_features: int, out_features: int, norm: str = "rms") -> None:
        super().__init__()
        self.linear = Linear(in_features, out_features)
        self.norm = make_norm(out_features, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.norm.silu(self.linear(x))


class MLP(nn.Sequential):
    """`layers` layers of `units`."""

    def __init__(self, in_features: int, units: int, layers: int, norm: str = "rms") -> None:
        widths = [in_features] + [units] * layers
        super().__init__(*(Layer(a, b, norm) for a, b in itertools.pairwise(widths)))


class Conv(nn.Conv2d):
    """5x5 convolution with 2 pixels of padding all around and the official initialisation."""

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, ops.KERNEL, stride, padding=ops.KERNEL // 2)

    def reset_parameters(self) -> None:
        """Draws the kernel, zeroes the bias."""
        init_(self.weight, self.weight[0].numel())
        nn.init.zeros_(self.bias)
