"""Native CPU kernels: twins of functions of `ops`, with their backward passes written out.

Every function here has the name, the arguments and, up to rounding, the results of the function in
`ops` that it stands for; `fuse` decides which of the two runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rllib_dreamer.model.kernels_build import library

SUFFIXES = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


def available() -> bool:
    """Whether this machine has the native kernels; compiles them if need be."""
    return library() is not None


def accepts(x: Tensor) -> bool:
    """Whether the kernels handle the device and type of x."""
    return x.device.type == "cpu" and x.dtype in SUFFIXES


def call(name: str, dtype: torch.dtype | None, *args: Tensor | int) -> None:
    """Calls a C function.

    Args:
        name: Its name, without the suffix of the storage type.
        dtype: The storage type; None if the function exists for one only.
        *args: Contiguous tensors, passed as pointers, and integers, passed as int64.
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
    return torch.zeros(torch.get_num_threads(), width, dtype=torch.float64)


class _NormSilu(torch.autograd.Function):
    """`columns` is the number of columns of the map in phases, 0 if there are none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, columns: int) -> Tensor:
        x = x.contiguous()
        width = scale.shape[0]
        y = torch.empty_like(x)
        call("norm_silu_forward", x.dtype, x, scale, y, x.numel() // width, width, columns)
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
        call("norm_silu_backward", x.dtype, x, scale, grad, gx, gscale, *sizes)
        return gx, gscale.sum(0).to(scale.dtype), None


def norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    """See `ops.norm_silu`."""
    return _NormSilu.apply(x, scale, 0)


def phase_norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    """See `ops.phase_norm_silu`."""
    n, h, w, _ = x.shape
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
    return _ImageLoss.apply(phases, target)


def normalize_frames(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """See `ops.normalize_frames`."""
    frames = frames.contiguous()
    y = torch.empty_like(frames, dtype=dtype)
    call("normalize_frames_forward", dtype, frames, y, frames.numel())
    return y
