"""Native CPU kernels, with their backward passes written out.

In this order:

- whether there are kernels, what they accept and how they are called, here and in `kernels_rssm`
- twins of functions of `ops`: the same name, arguments and, up to rounding, results; `fuse` decides
  which of the two runs
- parts of `world_model.NativeTwoHot` and of `optim.LaProp`, which call them by themselves
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rllib_dreamer.model.kernels_build import library

TwoHotTarget = tuple[Tensor, Tensor, Tensor]
SUFFIXES = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


def available() -> bool:
    """Whether this machine has the native kernels; compiles them if need be."""
    return library() is not None


def accepts(x: Tensor) -> bool:
    """Whether the kernels handle the device and type of x: real numbers, or frames."""
    return x.device.type == "cpu" and (x.dtype in SUFFIXES or x.dtype == torch.uint8)


def accepts_float32(x: Tensor) -> bool:
    """Whether x lies contiguously in float32 on the CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()


def call(name: str, dtype: torch.dtype | None, *args: Tensor | int | None) -> None:
    """Calls a C function.

    Args:
        name: Its name, without the suffix of the storage type.
        dtype: The storage type; None if the function exists for one only.
        *args: Tensors, passed as pointers to their first element, integers, passed as int64, and
            None, the null pointer.
    """
    _function(name + (SUFFIXES[dtype] if dtype else ""))(
        *[x.data_ptr() if isinstance(x, Tensor) else x for x in args]
    )


_functions: dict[str, Callable[..., Any]] = {}


def _function(name: str) -> Callable[..., Any]:
    if name not in _functions:
        native = library()
        assert native is not None
        function = getattr(native, name)
        function.restype = None
        _functions[name] = lambda *args: function(*map(ctypes.c_void_p, args))
    return _functions[name]


def partial_sums(width: int) -> Tensor:
    """(threads, width) float64 zeros, in which each thread collects a gradient."""
    native = library()
    assert native is not None
    native.max_threads.restype = ctypes.c_int64
    return torch.zeros(native.max_threads(), width, dtype=torch.float64)


class _NormSilu(torch.autograd.Function):
    """`columns` is the number of columns of the map in phases, 0 if there are none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, columns: int) -> Tensor:
        x = x.contiguous()
        width = scale.shape[0]
        y = torch.empty_like(x)
        sizes = (width, x.numel() // width, width, columns)
        call("norm_silu_forward", x.dtype, x, scale, y, *sizes)
        ctx.save_for_backward(x, scale)
        ctx.columns = columns
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        width = scale.shape[0]
        grad, gx, gscale = grad.contiguous(), torch.empty_like(x), partial_sums(width)
        sizes = (x.numel() // width, width, ctx.columns)
        call("norm_silu_backward", x.dtype, x, scale, grad, width, gx, gscale, *sizes)
        return gx, gscale.sum(0).to(scale.dtype), None


def _check_scale(scale: Tensor, width: int) -> None:
    assert scale.dtype == torch.float32 and scale.shape == (width,), (scale.dtype, scale.shape)


def norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    """See `ops.norm_silu`."""
    _check_scale(scale, x.shape[-1])
    return _NormSilu.apply(x, scale, 0)


def phase_norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    """See `ops.phase_norm_silu`."""
    n, h, w, width = x.shape
    _check_scale(scale, width // 4)
    return _NormSilu.apply(x, scale, w).view(n, 2 * h, 2 * w, -1)


class _PoolNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        x = x.contiguous()
        n, h, w, channels = x.shape
        y = x.new_empty(n, h // 2, w // 2, channels)
        pooled, which = torch.empty_like(y), torch.empty_like(y, dtype=torch.uint8)
        sizes = (n * h // 2, w // 2, channels)
        call("pool_norm_silu_forward", x.dtype, x, scale, y, pooled, which, *sizes)
        ctx.save_for_backward(pooled, which, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        pooled, which, scale = ctx.saved_tensors
        n, h, w, channels = pooled.shape
        gx, gscale = pooled.new_empty(n, 2 * h, 2 * w, channels), partial_sums(channels)
        buffers = (pooled, which, scale, grad.contiguous(), gx, gscale)
        call("pool_norm_silu_backward", pooled.dtype, *buffers, n * h, w, channels)
        return gx, gscale.sum(0).to(scale.dtype)


def pool_norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    """See `ops.pool_norm_silu`."""
    _check_scale(scale, x.shape[-1])
    assert x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0, x.shape
    return _PoolNormSilu.apply(x, scale)


class _ImageLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, phases: Tensor, target: Tensor) -> Tensor:
        phases, target = phases.contiguous(), target.contiguous()
        n, h, w, channels = phases.shape
        loss = phases.new_empty(n, dtype=torch.float32)
        call("image_loss_forward", phases.dtype, phases, target, loss, n, h, w, channels // 4)
        ctx.save_for_backward(phases, target)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        phases, target = ctx.saved_tensors
        n, h, w, channels = phases.shape
        gphases, sizes = torch.empty_like(phases), (n, h, w, channels // 4)
        buffers = (phases, target, grad.contiguous(), gphases)
        call("image_loss_backward", phases.dtype, *buffers, *sizes)
        return gphases, None


def image_loss(phases: Tensor, target: Tensor) -> Tensor:
    """See `ops.image_loss`."""
    n, h, w, channels = phases.shape
    assert target.dtype == torch.uint8, target.dtype
    assert target.shape == (n, 2 * h, 2 * w, channels // 4), target.shape
    return _ImageLoss.apply(phases, target)


def normalize_frames(frames: Tensor) -> Tensor:
    """See `ops.normalize_frames`."""
    assert frames.dtype == torch.uint8, frames.dtype
    frames = frames.contiguous()
    y = torch.empty_like(frames, dtype=torch.float32)
    call("normalize_frames", None, frames, y, frames.numel())
    return y


class _TwoHotLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, log_sum: Tensor, below: Tensor, above: Tensor, weight: Tensor
    ) -> Tensor:
        low, high = (logits.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (below, above))
        ctx.save_for_backward(logits, log_sum, below, above, weight)
        return log_sum - torch.lerp(low, high, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits = ctx.saved_tensors[0]
        glogits, bins = torch.empty_like(logits), logits.shape[-1]
        sizes = (logits.numel() // bins, bins)
        call("two_hot_backward", None, *ctx.saved_tensors, grad.contiguous(), glogits, *sizes)
        return glogits, None, None, None, None


def two_hot_loss(logits: Tensor, log_sum: Tensor, target: TwoHotTarget) -> Tensor:
    """Cross-entropy (...) of `distributions.TwoHot`.

    Args:
        logits: Contiguous float32 (..., bins).
        log_sum: (...), from `two_hot_statistics`.
        target: Bins below and above, weight of the one above, (...) each.
    """
    below, above, weight = (x.contiguous() for x in target)
    return _TwoHotLoss.apply(logits, log_sum, below, above, weight)


@torch.no_grad()
def two_hot_statistics(logits: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the sum of exponentials (...) and expected bin (...) of contiguous (..., bins)."""
    log_sum, mean = logits.new_empty(logits.shape[:-1]), logits.new_empty(logits.shape[:-1])
    sizes = (log_sum.numel(), logits.shape[-1])
    call("two_hot_forward", None, logits, bins, log_sum, mean, *sizes)
    return log_sum, mean


def laprop(
    param: Tensor, grad: Tensor, momentum: Tensor, square: Tensor, factors: tuple[float, ...]
) -> None:
    """One step of `optim.LaProp` on contiguous float32 tensors, in place.

    Args:
        param: Changed, as `momentum` and `square` are.
        grad: Its gradient, not clipped.
        momentum: m of `LaProp`.
        square: v of `LaProp`, the second moment.
        factors: Of the clipping, of the weight decay, beta1, beta2, 1 - beta2^t, eps and
            learning rate / (1 - beta1^t).
    """
    options = torch.tensor(factors, dtype=torch.float32)
    call("laprop", None, param, grad, momentum, square, param.numel(), options)
