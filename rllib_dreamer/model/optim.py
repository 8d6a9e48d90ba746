"""LaProp with adaptive gradient clipping and linear warm-up (official `opt` config)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


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
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4e-5,
        *,
        agc: float = 0.3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        warmup: int = 1000,
        weight_decay: float = 0.0,
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
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        moments, scales = self._state(params)
        grads = clip_by_parameter_norm([p.grad for p in params], params, group["agc"])
        group["step"] += 1  # on the host: never a device synchronisation
        count = group["step"]
        torch._foreach_mul_(scales, beta2)
        torch._foreach_addcmul_(scales, grads, grads, 1.0 - beta2)
        roots = torch._foreach_div(scales, 1.0 - beta2**count)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(grads, roots)
        torch._foreach_lerp_(moments, grads, 1.0 - beta1)
        warmup = group["warmup"]
        lr = group["lr"] * (min(1.0, (count - 1) / warmup) if warmup else 1.0)
        if group["weight_decay"]:
            kernels = [p for p in params if p.ndim > 1]
            torch._foreach_mul_(kernels, 1.0 - lr * group["weight_decay"])
        group["scaled_lr"] = lr / (1.0 - beta1**count)
        torch._foreach_add_(params, moments, alpha=-group["scaled_lr"])

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
        """Momenta and second moments, created on first use."""
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        return [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]


def clip_by_parameter_norm(grads: list[Tensor], params: list[Tensor], agc: float) -> list[Tensor]:
    """Adaptive gradient clipping: shrinks each gradient to at most agc * max(1e-3, |p|) in L2 norm."""
    limits = torch._foreach_norm(params)
    torch._foreach_clamp_min_(limits, 1e-3)
    torch._foreach_mul_(limits, agc)
    ratios = torch._foreach_div(torch._foreach_norm(grads), limits)
    torch._foreach_clamp_min_(ratios, 1.0)
    return list(torch._foreach_div(grads, ratios))
