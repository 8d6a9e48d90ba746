"""Output distributions of the heads. Each holds float32 tensors and has no parameters.

Those of predictions have `loss(target)`; those of actions have `mode()`, `sample(noise)`,
`log_prob(event)`, `entropy()` and `max_entropy()`.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rllib_dreamer.model import ops


class Noise(Protocol):
    """Where randomness comes from, so that tests can take it away."""

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Uniform noise in [0, 1), or None to take the most probable class."""

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Noise in units of the standard deviation."""


class RandomNoise:
    """Noise from PyTorch's global generator of the device."""

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Uniform noise in [0, 1)."""
        return torch.rand(shape, device=device)

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard normal noise."""
        return torch.randn(shape, device=device)


class FixedNoise:
    """No randomness: classes by their mode, normals at `mean + eps * std`."""

    def __init__(self, eps: float = 0.0) -> None:
        self.eps = eps

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """None: the most probable class."""
        return None

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The constant `eps`."""
        return torch.full(shape, self.eps, device=device)


class TwoHot:
    """Categorical over symexp-spaced bins that predicts a real number (paper eq. 10, 11).

    The weights of the two-hot target are linear in the values of the bins, not in symlog space.

    Args:
        logits: (..., bins).
        bins: (bins,) ascending, symmetric about an exact zero in the middle.
    """

    def __init__(self, logits: Tensor, bins: Tensor) -> None:
        self.logits = logits.float()
        self.bins = bins

    @cached_property
    def log_probs(self) -> Tensor:
        """(..., bins)."""
        return F.log_softmax(self.logits, -1)

    @property
    def mean(self) -> Tensor:
        """Expected value (...), summed from the middle outwards: uniform weights give exactly 0."""
        weighted = self.log_probs.exp() * self.bins
        middle = (self.bins.shape[0] - 1) // 2
        left, right = weighted[..., :middle], weighted[..., middle + 1 :]
        return weighted[..., middle] + (left.flip(-1) + right).sum(-1)

    def loss(self, target: Tensor) -> Tensor:
        """Cross-entropy (...) to the two-hot encoding of target (...); beyond the ends, the end."""
        below, above, weight_above = two_hot(target.detach().float(), self.bins)
        log_below = self.log_probs.gather(-1, below.unsqueeze(-1)).squeeze(-1)
        log_above = self.log_probs.gather(-1, above.unsqueeze(-1)).squeeze(-1)
        return -((1.0 - weight_above) * log_below + weight_above * log_above)


def two_hot(target: Tensor, bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the bins below and above the target (...) and the weight of the one above."""
    last = bins.shape[0] - 1
    above = torch.searchsorted(bins, target.contiguous(), right=True)  # first bin > target
    below = (above - 1).clamp(0, last)
    above = above.clamp(0, last)
    to_below = (bins[below] - target).abs()
    to_above = (bins[above] - target).abs()
    same = (below == above) & ~target.isnan()  # NaN stays NaN, for whoever looks for it
    total = torch.where(same, torch.ones_like(to_below), to_below + to_above)
    return below, above, torch.where(same, torch.full_like(to_below, 0.5), to_below / total)


class Binary:
    """Bernoulli with soft targets.

    Args:
        logit: (...).
    """

    def __init__(self, logit: Tensor) -> None:
        self.logit = logit.float()

    def prob(self) -> Tensor:
        """Probability of one (...)."""
        return torch.sigmoid(self.logit)

    def loss(self, target: Tensor) -> Tensor:
        """Cross-entropy (...) to a target in [0, 1]."""
        return F.binary_cross_entropy_with_logits(self.logit, target.float(), reduction="none")


class Categorical:
    """Discrete action components, mixed with `unimix` of the uniform distribution.

    The paper mixes 1 % into the actor; the official code does not (`unimix=0`).

    Args:
        logits: (..., n, K) of n independent components.
        unimix: Share of the uniform distribution in [0, 1).
        valid: (n, K) True where a class exists, for components with different numbers of classes.
        limits: These numbers, on the host, given together with `valid`.
    """

    def __init__(
        self,
        logits: Tensor,
        unimix: float = 0.0,
        valid: Tensor | None = None,
        limits: tuple[int, ...] = (),
    ) -> None:
        n, classes = logits.shape[-2:]
        self.valid, self.limits = valid, limits or (classes,) * n
        if valid is None:
            self.log_probs = ops.unimix_log_probs(logits, unimix)
        else:
            probs = F.softmax(logits.float().masked_fill(~valid, -torch.inf), -1)
            probs = (1.0 - unimix) * probs + unimix * valid / valid.sum(-1, keepdim=True)
            self.log_probs = torch.log(probs.clamp(min=1e-30))

    def mode(self) -> Tensor:
        """Most probable classes (..., n)."""
        return self.log_probs.argmax(-1)

    def sample(self, noise: Noise) -> Tensor:
        """Class indices (..., n)."""
        shape = tuple(self.log_probs.shape[:-1])
        return ops.sample_index(self.log_probs.exp(), noise.uniform(shape, self.log_probs.device))

    def log_prob(self, event: Tensor) -> Tensor:
        """(...), summed over the components."""
        return self.log_probs.gather(-1, event.long().unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self, noise: Noise | None = None) -> Tensor:
        """(...), summed over the components; exact, without noise."""
        return -(self.log_probs.exp() * self.log_probs).sum((-2, -1))

    def max_entropy(self) -> float:
        """Entropy of the uniform distribution, for the ratio that metrics report."""
        return sum(math.log(count) for count in self.limits)


class BoundedNormal:
    """Normal with a mean in (-1, 1) and a bounded std; samples are neither squashed nor clipped.

        mean = tanh(raw_mean),   std = (max_std - min_std) * sigmoid(raw_std + 2) + min_std

    (official head `bounded_normal`; the environment's side clips to [-1, 1]).

    Args:
        raw_mean: (..., n).
        raw_std: (..., n).
        min_std: Lower bound of the std.
        max_std: Upper bound of the std.
    """

    def __init__(
        self, raw_mean: Tensor, raw_std: Tensor, min_std: float = 0.1, max_std: float = 1.0
    ) -> None:
        self.mean = torch.tanh(raw_mean.float())
        self.std = _bounded_std(raw_std, min_std, max_std)
        self.bounds = (min_std, max_std)

    def mode(self) -> Tensor:
        """The mean (..., n)."""
        return self.mean

    def sample(self, noise: Noise) -> Tensor:
        """(..., n), differentiable with respect to mean and std."""
        return self.mean + self.std * noise.normal(tuple(self.mean.shape), self.mean.device)

    def log_prob(self, event: Tensor) -> Tensor:
        """(...), summed over the components."""
        return _normal_log_prob(event.float(), self.mean, self.std).sum(-1)

    def entropy(self, noise: Noise | None = None) -> Tensor:
        """(...), summed over the components; exact, without noise."""
        return (0.5 * torch.log(2 * math.pi * self.std.square()) + 0.5).sum(-1)

    def max_entropy(self) -> float:
        """Entropy at the largest std, for the ratio that metrics report."""
        per_component = 0.5 * math.log(2 * math.pi * self.bounds[1] ** 2) + 0.5
        return float(self.mean.shape[-1]) * per_component


class TanhNormal:
    """Normal squashed by tanh: a = tanh(u), u ~ Normal(mean, std), with the std of BoundedNormal.

    log p(a) = log Normal(u) - log(1 - tanh(u)^2)  (Haarnoja et al. 2018, appendix C).

    Args:
        mean: (..., n) before the tanh.
        raw_std: (..., n).
        min_std: Lower bound of the std.
        max_std: Upper bound of the std.
    """

    def __init__(
        self, mean: Tensor, raw_std: Tensor, min_std: float = 0.1, max_std: float = 1.0
    ) -> None:
        self.mean = mean.float()
        self.std = _bounded_std(raw_std, min_std, max_std)

    def mode(self) -> Tensor:
        """The tanh of the mean (..., n)."""
        return torch.tanh(self.mean)

    def _draw(self, noise: Noise) -> Tensor:
        return self.mean + self.std * noise.normal(tuple(self.mean.shape), self.mean.device)

    def sample(self, noise: Noise) -> Tensor:
        """(..., n) in [-1, 1], differentiable with respect to mean and std."""
        return torch.tanh(self._draw(noise))

    def log_prob(self, event: Tensor) -> Tensor:
        """(...), summed over the components; events at +-1 count as 1e-6 inside."""
        return self._log_prob_before_tanh(torch.atanh(event.float().clamp(-_EDGE, _EDGE)))

    def _log_prob_before_tanh(self, x: Tensor) -> Tensor:
        log_slope = 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))  # log(1 - tanh(x)^2)
        return (_normal_log_prob(x, self.mean, self.std) - log_slope).sum(-1)

    def entropy(self, noise: Noise | None = None) -> Tensor:
        """(...), summed over the components: -log p of one differentiable sample.

        There is no closed form; the estimate and its gradient are unbiased.
        """
        return -self._log_prob_before_tanh(self._draw(noise or RandomNoise()))

    def max_entropy(self) -> float:
        """Entropy of the uniform distribution on [-1, 1]."""
        return float(self.mean.shape[-1]) * math.log(2.0)


_EDGE = 1.0 - 1e-6


def _bounded_std(raw: Tensor, low: float, high: float) -> Tensor:
    return (high - low) * torch.sigmoid(raw.float() + 2.0) + low


def _normal_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise."""
    z = (x - mean) / std
    return -0.5 * z.square() - torch.log(std) - 0.5 * math.log(2 * math.pi)
