"""Pure functions of the algorithm: no parameters, no state, nothing but tensors in and out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rllib_dreamer.model.fuse import fused

# Standard deviation of a unit normal truncated to [-2, 2] is 0.87962566; dividing by it restores 1.
TRUNC_NORMAL_SCALE = 1.1368

KERNEL = 5  # side of every convolution's kernel, `upsample_conv` folds no other

Gather = Callable[[Tensor], Tensor]


def symlog(x: Tensor) -> Tensor:
    """sign(x) * log(1 + |x|), the squashing of vector observations (paper eq. 9)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """sign(x) * (exp(|x|) - 1), the inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-4) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * scale
    return x32.to(x.dtype)


@fused
def norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    """SiLU of the RMS norm over the last axis."""
    return F.silu(rms_norm(x, scale))


@fused
def pool_norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    """2x2 max pool, RMS norm over the channels, SiLU: (n, h, w, C) -> (n, h / 2, w / 2, C).

    Of equal entries the first in reading order gets the gradient, as with any max pool.
    """
    left, right = x.unflatten(2, (-1, 2)).unbind(3)  # (n, h, w / 2, C) each
    wide = torch.where(left >= right, left, right)
    top, bottom = wide.unflatten(1, (-1, 2)).unbind(2)  # (n, h / 2, w / 2, C) each
    return F.silu(rms_norm(torch.where(top >= bottom, top, bottom), scale))


@fused
def phase_norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    """Puts the phases of `upsample_conv` in place, RMS norm over the channels, SiLU.

    (n, h, w, 4 * C) -> (n, 2h, 2w, C).
    """
    return F.silu(rms_norm(place_phases(x), scale))


@fused
def image_loss(phases: Tensor, target: Tensor) -> Tensor:
    """Squared error (n,) of sigmoid(pixels) to uint8 frames, summed over h, w and C.

    Args:
        phases: (n, h / 2, w / 2, 4 * C), from `upsample_conv`.
        target: uint8 (n, h, w, C).
    """
    error = torch.sigmoid(place_phases(phases.float())) - target / 255.0
    return error.square().sum((1, 2, 3))


@fused
def normalize_frames(frames: Tensor) -> Tensor:
    """uint8 in 0..255 -> x / 255 - 0.5."""
    return frames / 255.0 - 0.5


def place_phases(x: Tensor) -> Tensor:
    """(n, h, w, 4 * C), channels as (row parity, column parity, C) -> (n, 2h, 2w, C)."""
    n, h, w, _ = x.shape
    x = x.reshape(n, h, w, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)  # (n, h, 2, w, 2, C)
    return x.reshape(n, 2 * h, 2 * w, -1)


def one_hot(index: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One-hot of an integer index (...) -> (..., classes). A negative index gives all zeros."""
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).to(dtype)


def unimix_log_probs(logits: Tensor, unimix: float) -> Tensor:
    """log((1 - unimix) * softmax(logits) + unimix / K) over the last axis, in float32."""
    logits = logits.float()
    if unimix == 0.0:
        return F.log_softmax(logits, -1)
    return torch.log((1.0 - unimix) * F.softmax(logits, -1) + unimix / logits.shape[-1])


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL[p || q] of independent categoricals (..., S, K), summed over the groups -> (...)."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def sample_index(probs: Tensor, uniform: Tensor | None) -> Tensor:
    """Draws class indices (...) from probs (..., K) by inverting the cumulative distribution.

    Args:
        probs: Probabilities over the last axis.
        uniform: Uniform noise in [0, 1) of shape (...); None takes the most probable class.
    """
    if uniform is None:
        return probs.argmax(-1)
    cdf = probs.cumsum(-1)
    threshold = uniform.unsqueeze(-1) * cdf[..., -1:]
    return (cdf[..., :-1] <= threshold).sum(-1)


def straight_through(index: Tensor, probs: Tensor) -> Tensor:
    """One-hot of `index` in the forward pass, the gradient of `probs` in the backward pass."""
    sample = one_hot(index, probs.shape[-1], probs.dtype)
    return sample + (probs - probs.detach())


def lambda_return(reward: Tensor, cont: Tensor, value: Tensor, lam: float) -> Tensor:
    """Returns of imagined trajectories (paper eq. 7; official `lambda_return` with disc = 1).

        R_H = v_H,   R_i = r_{i+1} + c_{i+1} * ((1 - lam) * v_{i+1} + lam * R_{i+1})

    Args:
        reward: (N, H + 1); entry 0, the reward that came with the start, is not used.
        cont: (N, H + 1) probability of going on, which is the discount; entry 0 is not used.
        value: (N, H + 1).
        lam: lambda in [0, 1].

    Returns:
        (N, H).
    """
    assert reward.shape == cont.shape == value.shape, (reward.shape, cont.shape, value.shape)
    inter = reward[:, 1:] + cont[:, 1:] * (1.0 - lam) * value[:, 1:]
    live = cont[:, 1:] * lam
    returns = [value[:, -1]]
    for i in reversed(range(inter.shape[1])):
        returns.append(inter[:, i] + live[:, i] * returns[-1])
    return torch.stack(returns[:0:-1], 1)


def replay_return(
    reward: Tensor, is_last: Tensor, is_terminal: Tensor, boot: Tensor, discount: float, lam: float
) -> Tensor:
    """Targets of the replay value loss (official `repl_loss`).

        R_{T-1} = boot_{T-1}
        R_t = r_{t+1} + live_{t+1} * ((1 - cont_{t+1}) * boot_{t+1} + cont_{t+1} * R_{t+1})

    with live = (1 - terminal) * discount and cont = (1 - last) * lam: a time limit bootstraps from
    `boot`, a termination does not.

    Args:
        reward: (B, T).
        is_last: (B, T) 1 at the last step of an episode, whatever ended it.
        is_terminal: (B, T) 1 where the environment terminated.
        boot: (B, T) the imagined return that starts at each step.
        discount: Discount of a step (`gamma`).
        lam: lambda in [0, 1].

    Returns:
        (B, T - 1).
    """
    assert reward.shape == is_last.shape == is_terminal.shape == boot.shape
    live = (1.0 - is_terminal[:, 1:].float()) * discount
    cont = (1.0 - is_last[:, 1:].float()) * lam
    inter = reward[:, 1:] + (1.0 - cont) * live * boot[:, 1:]
    live = live * cont
    returns = [boot[:, -1]]
    for t in reversed(range(inter.shape[1])):
        returns.append(inter[:, t] + live[:, t] * returns[-1])
    return torch.stack(returns[:0:-1], 1)


def percentiles(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Two percentiles of all entries of x, with linear interpolation (low, high in percent)."""
    ordered = x.detach().float().flatten().sort().values
    last = ordered.numel() - 1

    def at(percent: float) -> Tensor:
        position = percent / 100.0 * last
        below = int(position)
        above = min(below + 1, last)
        return torch.lerp(ordered[below], ordered[above], position - below)

    return at(low), at(high)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest x2 upsampling, then a 5x5 SAME convolution, on the small map.

    Every output pixel of one of the four phases (row parity, column parity) sees only a 3x3
    neighbourhood of the small map, so the 5x5 kernel folds into four 3x3 kernels, 9 multiplies
    instead of 25. `place_phases` puts the phases in place.

    Args:
        x: (n, C, h, w).
        weight: (O, C, 5, 5), the kernel on the upsampled map.
        bias: (O,).

    Returns:
        (n, h, w, 4 * O), channels as (row parity, column parity, O).
    """
    fold = _fold_matrix(weight.device).to(weight.dtype)
    phases = torch.einsum("pau,qbv,ocuv->pqocab", fold, fold, weight)  # (2, 2, O, C, 3, 3)
    phases = phases.flatten(0, 2)  # (4 * O, C, 3, 3)
    y = F.conv2d(x, phases, bias.repeat(4), padding=1)  # (n, 4 * O, h, w)
    return y.permute(0, 2, 3, 1)  # (n, h, w, 4 * O)


def _fold_matrix(device: torch.device) -> Tensor:
    """(phase, tap of the 3-kernel, tap of the 5-kernel): True if both fall on one small pixel.

    Made on the device each time: a copy from the host would make it wait, in every update.
    """
    phase, small, tap = (torch.arange(n, device=device) for n in (2, 3, KERNEL))
    pixel = (phase.unsqueeze(-1) + tap - 2) // 2 + 1  # (2, 5)
    return pixel.unsqueeze(1) == small.unsqueeze(-1)  # (2, 3, 5)


def symexp_bins(count: int) -> Tensor:
    """Bins of the two-hot heads: symexp of an even grid on [-20, 20], exactly symmetric, with 0.

    Args:
        count: Number of bins; odd, 255 in the official configuration.
    """
    half = symexp(torch.linspace(-20.0, 0.0, (count - 1) // 2 + 1))
    return torch.cat([half, -half[:-1].flip(0)])


def total_loss(losses: dict[str, Tensor], scales: dict[str, float]) -> Tensor:
    """Sum over the terms of scale * mean(loss). The one place where losses are weighed.

    Raises:
        ValueError: If the terms and the scales do not have the same names.
    """
    if losses.keys() != scales.keys():
        raise ValueError(
            f"losses without a scale: {sorted(losses.keys() - scales.keys())}, scales without a "
            f"loss: {sorted(scales.keys() - losses.keys())}. A decoder gives a loss for each leaf "
            "in its `images` and `vectors`, and for no other."
        )
    return torch.stack([losses[name].float().mean() * scales[name] for name in losses]).sum()


def concat(parts: Sequence[Tensor]) -> Tensor:
    """Concatenation along the last axis; a single part is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)
