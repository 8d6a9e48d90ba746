"""LaProp with adaptive gradient clipping and linear warm-up (official `opt` config), and Adam."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rllib_dreamer.model import kernels

OFFICIAL_EPS = 1e-20
FLUSHED_EPS = 3e-18
"""`eps` for CPUs that flush denormals: there v becomes 0 where |g| stays below about 3e-18, and
with the official one a step would be up to 300 times too long."""


class LaProp(torch.optim.Optimizer):
    """Clip by parameter norm, normalise by second moment, then momentum.

    For every tensor with gradient g and parameter p, at its t-th step:

        g <- g / max(1, |g| / (agc * max(1e-3, |p|)))          whole-tensor L2 norms
        v <- beta2 * v + (1 - beta2) * g^2,   u = g / (sqrt(v / (1 - beta2^t)) + eps)
        m <- beta1 * m + (1 - beta1) * u,     p <- p - lr_t * (m / (1 - beta1^t))

    lr_t rises linearly from zero over the first `warmup` steps; the very first step has lr_t = 0.

    Args:
        params: Parameters or groups; a group may have its own `lr`.
        lr: Learning rate.
        agc: Largest gradient norm as a share of the parameter's norm.
        betas: Decay of the momentum and of the second moment.
        eps: Added to the root of the second moment.
        warmup: Number of warm-up steps.
        weight_decay: Decoupled decay of matrices and kernels (official: off).
        fused: One native pass over each float32 parameter on a CPU instead of a dozen.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4e-5,
        *,
        agc: float = 0.3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = OFFICIAL_EPS,
        warmup: int = 1000,
        weight_decay: float = 0.0,
        fused: bool = False,
    ) -> None:
        if lr < 0 or agc <= 0 or warmup < 0:
            raise ValueError(f"lr={lr} and warmup={warmup} must be >= 0 and agc={agc} > 0.")
        defaults = {
            "lr": lr,
            "agc": agc,
            "betas": betas,
            "eps": eps,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "step": 0,
            "scaled_lr": 0.0,
        }
        self.fused = fused
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, _ = group["betas"]
        group["step"] += 1  # on the host: never a device synchronisation
        count, warmup = group["step"], group["warmup"]
        lr = group["lr"] * (min(1.0, (count - 1) / warmup) if warmup else 1.0)
        group["scaled_lr"] = lr / (1.0 - beta1**count)
        decay = 1.0 - lr * group["weight_decay"]
        if self.fused and all(map(kernels.accepts_float32, params)) and kernels.available():
            self._update_native(group, params, decay)
        else:
            self._update_plain(group, params, decay)

    def _update_plain(self, group: dict[str, Any], params: list[Tensor], decay: float) -> None:
        beta1, beta2 = group["betas"]
        momenta, squares = self._state(params)
        grads = clip_by_parameter_norm(_gradients(params), params, group["agc"])
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1.0 - beta2)
        roots = torch._foreach_div(squares, 1.0 - beta2 ** group["step"])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(grads, roots)
        torch._foreach_lerp_(momenta, grads, 1.0 - beta1)
        matrices = [p for p in params if p.ndim > 1]
        if decay != 1.0 and matrices:
            torch._foreach_mul_(matrices, decay)
        torch._foreach_add_(params, momenta, alpha=-group["scaled_lr"])

    def _update_native(self, group: dict[str, Any], params: list[Tensor], decay: float) -> None:
        beta1, beta2 = group["betas"]
        grads = [grad.contiguous() for grad in _gradients(params)]
        ratios = torch.stack(clip_ratios(grads, params, group["agc"])).tolist()
        common = (beta1, beta2, 1.0 - beta2 ** group["step"], group["eps"], group["scaled_lr"])
        for p, grad, momentum, square, ratio in zip(
            params, grads, *self._state(params), ratios, strict=True
        ):
            factors = (1.0 / ratio, decay if p.ndim > 1 else 1.0, *common)
            kernels.laprop(p, grad, momentum, square, factors)

    def update_norm(self) -> Tensor:
        """L2 norm of the latest change of all parameters, without weight decay."""
        norms = [
            torch.linalg.vector_norm(self.state[p]["exp_avg"]) * group["scaled_lr"]
            for group in self.param_groups
            for p in group["params"]
            if p in self.state
        ]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _state(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Momenta m and second moments v, created on first use; named as in PyTorch's Adam."""
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        return [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def clip_ratios(grads: list[Tensor], params: list[Tensor], agc: float) -> list[Tensor]:
    """What adaptive clipping divides by, scalars: max(1, |g| / (agc * max(1e-3, |p|)))."""
    limits = torch._foreach_norm(params)
    torch._foreach_clamp_min_(limits, 1e-3)
    torch._foreach_mul_(limits, agc)
    ratios = torch._foreach_div(torch._foreach_norm(grads), limits)
    torch._foreach_clamp_min_(ratios, 1.0)
    return list(ratios)


class Adam(torch.optim.Adam):
    """PyTorch's Adam with the linear warm-up of `LaProp` and its `update_norm`.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        warmup: Number of warm-up steps; with 0 it is exactly PyTorch's.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-4, *, warmup: int = 0) -> None:
        super().__init__(params, lr=lr)
        self._change = torch.zeros(())
        for group in self.param_groups:
            group |= {"warmup": warmup, "count": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in params]
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            warmup = group["warmup"]
            group["lr"] *= min(1.0, group["count"] / warmup) if warmup else 1.0
            group["count"] += 1
        super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        self._change = torch.nn.utils.get_total_norm(torch._foreach_sub(params, before))

    def update_norm(self) -> Tensor:
        """L2 norm of the latest change of all parameters."""
        return self._change


def clip_by_parameter_norm(grads: list[Tensor], params: list[Tensor], agc: float) -> list[Tensor]:
    """Adaptive clipping: shrinks each gradient to at most agc * max(1e-3, |p|) in L2 norm."""
    return list(torch._foreach_div(grads, clip_ratios(grads, params, agc)))
