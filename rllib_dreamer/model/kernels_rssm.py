"""The recurrent loops on a CPU: twins of `RSSM.observe` and `RSSM.imagine_step`.

Weights are laid out once for all steps, intermediate results go into buffers that are allocated
once, and the backward pass through time is written out: it carries the gradients of the states back
step by step and computes those of the weights at the end, in one product over all steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rllib_dreamer.model.kernels import call, partial_sums

FEW_ROWS, SMALL_BLOCK = 64, 2**18
"""Up to so many rows and weights of a block, the native products beat a library's, one by one."""


class CellWeights(NamedTuple):
    """Parameters of the recurrent cell, in the shapes that the loops multiply with.

    deter (U, D), stoch (U, S * K): the layers into the hidden units, with biases and norm scales.
    shared (3U, D): the rows of the cell's first block-linear layer that see those units, the same
    for all blocks. own (G, D / G, D / G): its rows that see the block's part of deter. gates
    (G, D / G, 3D / G).
    """

    deter: Tensor
    deter_bias: Tensor
    deter_scale: Tensor
    stoch: Tensor
    stoch_bias: Tensor
    stoch_scale: Tensor
    shared: Tensor
    own: Tensor
    bias: Tensor
    scale: Tensor
    gates: Tensor
    gates_bias: Tensor


class PosteriorWeights(NamedTuple):
    """The posterior's hidden layer on deter (U, D), its norm scale, its output layer (S * K, U)."""

    deter: Tensor
    scale: Tensor
    out: Tensor
    out_bias: Tensor


class CellBuffers(NamedTuple):
    """Intermediate results of the cell for n rows; a leading time axis keeps them for backward.

    Before the norms: deter_in, stoch_in (n, U), hidden (n, D). units (n, 3U): deter, stoch and
    action after theirs. state (n, D): hidden after its norm. gates (n, 3D), without bias.
    """

    deter_in: Tensor
    stoch_in: Tensor
    units: Tensor
    hidden: Tensor
    state: Tensor
    gates: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], weights: CellWeights, dtype: torch.dtype) -> CellBuffers:
        """Buffers of `shape` rows."""
        units, deter = weights.deter.shape
        widths = (units, units, 3 * units, deter, deter, 3 * deter)
        return cls(*(torch.empty(*shape, width, dtype=dtype) for width in widths))

    def step(self, t: int) -> CellBuffers:
        """The buffers of one time step."""
        return CellBuffers(*(x[t] for x in self))


class Scan(NamedTuple):
    """What `observe` computes from: sequences (T, B, ...), and the state before them (B, ...).

    keep (T, B, 1) is zero where an episode begins. action (T, B, U) is embedded. token_part
    (T, B, U) is what the tokens add to the posterior's hidden layer. noise (T, B, S), or None for
    the modes.
    """

    keep: Tensor
    action: Tensor
    token_part: Tensor
    noise: Tensor | None
    deter: Tensor
    stoch: Tensor


def norm_silu_into(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """SiLU of the norm of contiguous x (n, width) into `out`, whose rows may lie in wider ones."""
    call("norm_silu_forward", x.dtype, x, scale, out, out.stride(0), x.shape[0], x.shape[1], 0)


def norm_silu_gradient(
    x: Tensor, scale: Tensor, grad: Tensor, out: Tensor, partial: Tensor
) -> None:
    """Gradient of x into `out`; that of the scale is added to `partial`."""
    sizes = (x.shape[0], x.shape[1], 0)
    call("norm_silu_backward", x.dtype, x, scale, grad, grad.stride(0), out, partial, *sizes)


def sample_into(
    logits: Tensor, noise: Tensor | None, stoch: Tensor, index: Tensor, unimix: Tensor
) -> None:
    """Samples (n, S * K) one-hot rows and (n, S) classes; unimix (1,)."""
    n, groups = index.shape
    sizes = (n, groups, logits.shape[1] // groups)
    call("sample_forward", None, logits, noise, stoch, stoch.stride(0), index, *sizes, unimix)


def add_sample_gradient(
    logits: Tensor, grad: Tensor, out: Tensor, groups: int, unimix: Tensor
) -> None:
    """Adds to `out` what the gradient of the sample (n, S * K) gives the logits (n, S * K)."""
    n, width = grad.shape
    call("sample_backward", None, logits, grad, out, n, groups, width // groups, unimix)


def add_block_products(out: Tensor, x: Tensor, weight: Tensor, beta: int = 1) -> None:
    """Sets out (n, G * o) to beta * out + x (n, G * i) times the blocks (G, i, o); beta 0 or 1."""
    blocks, rows, columns = weight.shape
    small = len(x) <= FEW_ROWS and rows * columns <= SMALL_BLOCK
    if small and weight.dtype == torch.float32 and weight[0].is_contiguous():
        strides = (out, out.stride(0), x, x.stride(0), weight, weight.stride(0))
        call("block_products", None, *strides, beta, len(x), blocks, rows, columns)
        return
    for g in range(blocks):
        part = out[:, g * columns : (g + 1) * columns]
        torch.addmm(part, x[:, g * rows : (g + 1) * rows], weight[g], beta=beta, out=part)


def cell_into(
    weights: CellWeights,
    buffers: CellBuffers,
    deter: Tensor,
    stoch: Tensor,
    action: Tensor,
    out: Tensor,
) -> None:
    """One step of the block GRU, from deter (n, D), stoch (n, S * K), action (n, U) to out (n, D).

    States are float32; products are of the weights' type.
    """
    w, b = weights, buffers
    n, units = b.deter_in.shape
    x = deter.to(w.deter.dtype)
    torch.addmm(w.deter_bias, x, w.deter.T, out=b.deter_in)
    torch.addmm(w.stoch_bias, stoch.to(w.deter.dtype), w.stoch.T, out=b.stoch_in)
    norm_silu_into(b.deter_in, w.deter_scale, b.units[:, :units])
    norm_silu_into(b.stoch_in, w.stoch_scale, b.units[:, units:])
    b.units[:, 2 * units :].copy_(action)
    torch.addmm(w.bias, b.units, w.shared, out=b.hidden)
    add_block_products(b.hidden, x, w.own)
    norm_silu_into(b.hidden, w.scale, b.state)
    add_block_products(b.gates, b.state, w.gates, beta=0)
    blocks = w.own.shape[0]
    strides = (deter.stride(0), out, out.stride(0))
    sizes = (n, blocks, deter.shape[1] // blocks)
    call("gru_forward", b.gates.dtype, b.gates, w.gates_bias, deter, *strides, *sizes)


class _Inputs(NamedTuple):
    """All arguments of `observe` that are tensors."""

    scan: Scan
    cell: CellWeights
    post: PosteriorWeights

    @classmethod
    def unpack(cls, args: tuple[Any, ...]) -> _Inputs:
        """From the fields of all three, one after the other."""
        scan, cell = len(Scan._fields), len(CellWeights._fields)
        weights = CellWeights(*args[scan : scan + cell])
        return cls(Scan(*args[:scan]), weights, PosteriorWeights(*args[scan + cell :]))


class _Kept(NamedTuple):
    """What the forward pass leaves for the backward pass, (T, B, ...).

    from_deter, from_stoch: the states that each step began with. before, after: the posterior's
    hidden layer before and after its norm.
    """

    from_deter: Tensor
    from_stoch: Tensor
    deter: Tensor
    stoch: Tensor
    logits: Tensor
    before: Tensor
    after: Tensor


class _ResultGradients(NamedTuple):
    """Gradients (T, B, ...) of the results of `observe`."""

    deter: Tensor
    stoch: Tensor
    logits: Tensor


class _Through(NamedTuple):
    """Gradients (T, B, ...) of the results of all products."""

    logits: Tensor
    before: Tensor
    gates: Tensor
    hidden: Tensor
    units: Tensor
    deter_in: Tensor
    stoch_in: Tensor


class _Scales(NamedTuple):
    """Gradients of the norm scales, (threads, width) float64."""

    after: Tensor
    state: Tensor
    deter: Tensor
    stoch: Tensor


class _Observe(torch.autograd.Function):
    """Arguments: unimix, S, then the fields of `Scan`, `CellWeights` and `PosteriorWeights`."""

    @staticmethod
    def forward(ctx: Any, unimix: float, groups: int, *args: Tensor | None) -> tuple[Tensor, ...]:
        inputs = _Inputs.unpack(args)
        steps, rows, _ = inputs.scan.action.shape
        buffers = CellBuffers.empty((steps, rows), inputs.cell, torch.float32)
        index = torch.empty(steps, rows, groups, dtype=torch.int64)
        ctx.groups, ctx.unimix = groups, torch.tensor([unimix])
        kept = _observe(inputs, buffers, index, ctx.unimix)
        ctx.save_for_backward(*args, *buffers, *kept)
        ctx.mark_non_differentiable(index)
        return kept.deter, kept.stoch, kept.logits, index

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gdeter: Tensor, gstoch: Tensor, glogits: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        split = len(saved) - len(_Kept._fields)
        kept = _Kept(*saved[split:])
        first = split - len(CellBuffers._fields)
        inputs, buffers = _Inputs.unpack(saved[:first]), CellBuffers(*saved[first:split])
        grads = _ResultGradients(gdeter.contiguous(), gstoch.contiguous(), glogits.contiguous())
        through, scales, start = _backward_through_time(
            inputs, buffers, kept, grads, ctx.groups, ctx.unimix
        )
        weights = _weight_gradients(inputs.cell, buffers, kept, through, scales)
        action = through.units[..., 2 * inputs.cell.deter.shape[0] :]
        return None, None, None, action, through.before, None, *start, *weights


def _observe(inputs: _Inputs, buffers: CellBuffers, index: Tensor, unimix: Tensor) -> _Kept:
    """The loop over time; fills the buffers and the classes (T, B, S)."""
    scan, cell, post = inputs
    steps, rows, units = scan.action.shape
    from_deter, deter = (torch.empty(steps, *scan.deter.shape) for _ in range(2))
    from_stoch, stoch, logits = (torch.empty(steps, *scan.stoch.shape) for _ in range(3))
    before, after = (torch.empty(steps, rows, units) for _ in range(2))
    state = scan.deter, scan.stoch
    for t in range(steps):
        torch.mul(state[0], scan.keep[t], out=from_deter[t])
        torch.mul(state[1], scan.keep[t], out=from_stoch[t])
        cell_into(cell, buffers.step(t), from_deter[t], from_stoch[t], scan.action[t], deter[t])
        torch.addmm(scan.token_part[t], deter[t], post.deter.T, out=before[t])
        norm_silu_into(before[t], post.scale, after[t])
        torch.addmm(post.out_bias, after[t], post.out.T, out=logits[t])
        noise = None if scan.noise is None else scan.noise[t]
        sample_into(logits[t], noise, stoch[t], index[t], unimix)
        state = deter[t], stoch[t]
    return _Kept(from_deter, from_stoch, deter, stoch, logits, before, after)


def _backward_through_time(
    inputs: _Inputs,
    buffers: CellBuffers,
    kept: _Kept,
    grads: _ResultGradients,
    groups: int,
    unimix: Tensor,
) -> tuple[_Through, _Scales, tuple[Tensor, Tensor]]:
    """Carries the gradients of the states back through all steps, to the state before them.

    Args:
        inputs: What the forward pass computed from.
        buffers: Intermediate results of the cell.
        kept: The other results.
        grads: Gradients of the results.
        groups: S.
        unimix: (1,).
    """
    scan, cell, post = inputs
    units = cell.deter.shape[0]
    through = _Through(
        grads.logits.clone(),
        *map(torch.empty_like, (kept.before, buffers.gates, buffers.hidden, buffers.units)),
        *map(torch.empty_like, (buffers.deter_in, buffers.stoch_in)),
    )
    widths = (units, cell.own.shape[0] * cell.own.shape[1], units, units)
    scales = _Scales(*map(partial_sums, widths))
    carry_deter, carry_stoch = torch.zeros_like(scan.deter), torch.zeros_like(scan.stoch)
    own, gates = (w.transpose(1, 2).contiguous() for w in (cell.own, cell.gates))
    for t in reversed(range(scan.action.shape[0])):
        g, b = _Through(*(x[t] for x in through)), buffers.step(t)
        gstoch = grads.stoch[t] + carry_stoch
        add_sample_gradient(kept.logits[t], gstoch, g.logits, groups, unimix)
        norm_silu_gradient(kept.before[t], post.scale, g.logits @ post.out, g.before, scales.after)
        carry_deter += grads.deter[t]
        carry_deter.addmm_(g.before, post.deter)
        carry_deter = _gru_gradient(cell, b.gates, kept.from_deter[t], carry_deter, g.gates)
        gstate = torch.empty_like(b.state)
        add_block_products(gstate, g.gates, gates, beta=0)
        norm_silu_gradient(b.hidden, cell.scale, gstate, g.hidden, scales.state)
        torch.mm(g.hidden, cell.shared.T, out=g.units)
        norm_silu_gradient(
            b.deter_in, cell.deter_scale, g.units[:, :units], g.deter_in, scales.deter
        )
        norm_silu_gradient(
            b.stoch_in, cell.stoch_scale, g.units[:, units:], g.stoch_in, scales.stoch
        )
        add_block_products(carry_deter, g.hidden, own)
        carry_deter.addmm_(g.deter_in, cell.deter).mul_(scan.keep[t])
        carry_stoch = torch.mm(g.stoch_in, cell.stoch).mul_(scan.keep[t])
    return through, scales, (carry_deter, carry_stoch)


def _gru_gradient(
    cell: CellWeights, gates: Tensor, deter: Tensor, grad: Tensor, ggates: Tensor
) -> Tensor:
    """Gradient of the gates into `ggates`; returns the one that reaches deter past the gates."""
    gdeter, blocks = torch.empty_like(deter), cell.own.shape[0]
    sizes = (deter.shape[0], blocks, deter.shape[1] // blocks)
    call("gru_backward", gates.dtype, gates, cell.gates_bias, deter, grad, ggates, gdeter, *sizes)
    return gdeter


def _weight_gradients(
    cell: CellWeights, buffers: CellBuffers, kept: _Kept, through: _Through, scales: _Scales
) -> tuple[Tensor, ...]:
    """Gradients of the fields of `CellWeights` and `PosteriorWeights`, each in one product."""
    b = CellBuffers(*(x.flatten(0, 1) for x in buffers))
    k = _Kept(*(x.flatten(0, 1) for x in kept))
    g = _Through(*(x.flatten(0, 1) for x in through))
    blocks = cell.own.shape[0]
    after, state, deter, stoch = (x.sum(0).float() for x in scales)
    return (
        *(g.deter_in.T @ k.from_deter, g.deter_in.sum(0), deter),
        *(g.stoch_in.T @ k.from_stoch, g.stoch_in.sum(0), stoch),
        b.units.T @ g.hidden,
        _block_gradient(k.from_deter, g.hidden, blocks),
        *(g.hidden.sum(0), state),
        *(_block_gradient(b.state, g.gates, blocks), g.gates.sum(0)),
        *(g.before.T @ k.deter, after),
        *(g.logits.T @ k.after, g.logits.sum(0)),
    )


def _block_gradient(x: Tensor, grad: Tensor, blocks: int) -> Tensor:
    """(n, G * i), (n, G * o) -> gradient (G, i, o) of the block weights."""
    n = x.shape[0]
    x, grad = (y.reshape(n, blocks, -1).transpose(0, 1) for y in (x, grad))  # (G, n, .)
    return torch.bmm(x.transpose(1, 2), grad)


def observe(
    scan: Scan, cell: CellWeights, post: PosteriorWeights, unimix: float, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Filters (T, B, ...) sequences, differentiably.

    Args:
        scan: The inputs.
        cell: Weights of the cell.
        post: Weights of the posterior.
        unimix: Share of the uniform distribution in the samples' probabilities.
        groups: S.

    Returns:
        deter (T, B, D), stoch and logits (T, B, S * K), index (T, B, S).
    """
    return _Observe.apply(unimix, groups, *scan, *cell, *post)
