"""Recurrent state-space model: block-diagonal GRU, categorical latents (official `rssm.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rllib_dreamer.model import kernels_rssm, nets, ops
from rllib_dreamer.model.distributions import Noise
from rllib_dreamer.model.fuse import native
from rllib_dreamer.model.kernels_rssm import CellBuffers, CellWeights, PosteriorWeights, Scan
from rllib_dreamer.model.sizes import ModelConfig

# feat (n, F), encoded action (n, A), noise (n, S) or None, out: writes the next feat (n, F) there.
Transition = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]


class State(NamedTuple):
    """Recurrent state of one batch axis: deter (n, D) and stoch (n, S, K), a one-hot sample."""

    deter: Tensor
    stoch: Tensor


class Posterior(NamedTuple):
    """Filtered states of replayed rows.

    deter (B, T, D), stoch (B, T, S, K) with straight-through gradients, index (B, T, S) the
    sampled classes, logits (B, T, S, K) before the uniform mix.
    """

    deter: Tensor
    stoch: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    logits: Tensor


def gated(deter: Tensor, reset: Tensor, cand: Tensor, update: Tensor) -> Tensor:
    """The next deter u * tanh(sigmoid(reset) * cand) + (1 - u) * deter, u = sigmoid(update - 1)."""
    update = torch.sigmoid(update - 1.0)
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    return update * cand + (1.0 - update) * deter


class RSSM(nn.Module):
    """The sequence model with its prior and its posterior.

    Args:
        embed: E, width of the encoder's tokens.
        action: A, width of the encoded action.
        config: Architecture.
    """

    def __init__(self, embed: int, action: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._build_cell(action)
        deter, hidden, flat = config.deter, config.hidden, config.stoch * config.classes
        self.prior = nets.MLP(deter, hidden, config.prior_layers, config.norm)
        self.prior_out = nets.Linear(hidden, flat)
        self.posterior = nets.MLP(deter + embed, hidden, config.posterior_layers, config.norm)
        self.posterior_out = nets.Linear(hidden, flat)

    def _build_cell(self, action: int) -> None:
        c = self.config
        self.deter_in = nets.Layer(c.deter, c.hidden, c.norm)
        self.stoch_in = nets.Layer(c.stoch * c.classes, c.hidden, c.norm)
        self.action_in = nets.Layer(action, c.hidden, c.norm)
        self.cell_in = nets.BlockLinear(c.deter + 3 * c.hidden * c.blocks, c.deter, c.blocks)
        self.cell_norm = nets.make_norm(c.deter, c.norm)
        self.gates = nets.BlockLinear(c.deter, 3 * c.deter, c.blocks)

    def _native(self, x: Tensor) -> bool:
        """Whether the native kernels, which know the block GRU with RMS norm, are to be used."""
        return self.config.norm == "rms" and native(x)

    def initial(self, n: int, device: torch.device | str = "cpu") -> State:
        """The all-zero state (n, D), (n, S, K)."""
        c = self.config
        return State(
            torch.zeros(n, c.deter, device=device),
            torch.zeros(n, c.stoch, c.classes, device=device),
        )

    def state(self, deter: Tensor, index: Tensor) -> State:
        """From deter (..., D) and class indices (..., S), as acting and the replay keep them."""
        return State(deter.float(), ops.one_hot(index.long(), self.config.classes))

    def prepare_action(self, action: Tensor) -> Tensor:
        """Encoded action (n, A), scaled into [-1, 1] elementwise and embedded (n, U)."""
        return self.action_in(action / action.detach().abs().clamp(min=1.0))

    def cell(self, state: State, action: Tensor) -> Tensor:
        """One step of the block GRU: (deter, stoch) and embedded action (n, U) -> deter (n, D)."""
        deter = state.deter
        n, blocks = deter.shape[0], self.config.blocks
        inputs = [self.deter_in(deter), self.stoch_in(state.stoch.flatten(1)), action]
        x = torch.cat([part.float() for part in inputs], -1)  # (n, 3U)
        x = x.unsqueeze(1).expand(-1, blocks, -1)  # (n, G, 3U), the same for every block
        x = torch.cat([deter.reshape(n, blocks, -1), x], -1).flatten(1)  # (n, D + G * 3U)
        x = self.cell_norm.silu(self.cell_in(x))  # (n, D)
        gates = self.gates(x).float().reshape(n, blocks, 3, -1)  # (n, G, 3, D / G)
        reset, cand, update = (g.flatten(1) for g in gates.unbind(2))  # (n, D) each
        return gated(deter, reset, cand, update)

    def prior_logits(self, deter: Tensor) -> Tensor:
        """(..., D) -> (..., S, K), before the uniform mix."""
        logits = self.prior_out(self.prior(deter)).float()
        return logits.unflatten(-1, (self.config.stoch, self.config.classes))

    def posterior_logits(self, deter: Tensor, tokens: Tensor) -> Tensor:
        """(n, D), (n, E) -> (n, S, K), before the uniform mix."""
        logits = self.posterior_out(self.posterior(torch.cat([deter, tokens], -1))).float()
        return logits.unflatten(-1, (self.config.stoch, self.config.classes))

    def sample(self, logits: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draws stoch (n, S, K) with straight-through gradients; also the class indices (n, S)."""
        probs = ops.unimix_log_probs(logits, self.config.unimix).exp()
        index = ops.sample_index(probs, uniform)
        return ops.straight_through(index, probs), index

    def imagine_step(self, state: State, action: Tensor, uniform: Tensor | None) -> State:
        """One step under the prior, from encoded actions (n, A)."""
        deter = self.cell(state, self.prepare_action(action))
        stoch, _ = self.sample(self.prior_logits(deter), uniform)
        return State(deter, stoch)

    def observe_step(
        self, state: State, action: Tensor, tokens: Tensor, uniform: Tensor | None
    ) -> tuple[State, Tensor, Tensor]:
        """One step under the posterior -> state, class indices (n, S), logits (n, S, K).

        Args:
            state: (deter, stoch), already zero where an episode begins.
            action: Prepared previous action, see `prepare_action`.
            tokens: (n, E).
            uniform: Noise (n, S), or None for the mode.
        """
        deter = self.cell(state, action)
        logits = self.posterior_logits(deter, tokens)
        stoch, index = self.sample(logits, uniform)
        return State(deter, stoch), index, logits

    def observe(
        self, state: State, action: Tensor, tokens: Tensor, is_first: Tensor, noise: Noise
    ) -> Posterior:
        """Filters replayed rows.

        Args:
            state: The carry from the context step, (B, D), (B, S, K).
            action: Encoded action *before* each step (B, T, A).
            tokens: (B, T, E).
            is_first: (B, T); there the carry and the previous action count as zero.
            noise: Source of randomness.
        """
        rows, steps = is_first.shape
        keep = 1.0 - is_first.float().unsqueeze(-1)  # (B, T, 1)
        uniform = noise.uniform((steps, rows, self.config.stoch), tokens.device)
        if self._native(tokens) and len(self.posterior) == 1:
            with torch.autocast("cpu", enabled=False):
                return self._observe_native(state, action, tokens, keep, uniform)
        embedded = self.prepare_action(action * keep)  # (B, T, U)
        outputs = []
        for t in range(steps):
            state = State(state.deter * keep[:, t], state.stoch * keep[:, t, :, None])
            state, index, logits = self.observe_step(
                state, embedded[:, t], tokens[:, t], None if uniform is None else uniform[t]
            )
            outputs.append((state.deter, state.stoch, index, logits))
        return Posterior(*(torch.stack(parts, 1) for parts in zip(*outputs, strict=True)))

    def _observe_native(
        self, state: State, action: Tensor, tokens: Tensor, keep: Tensor, uniform: Tensor | None
    ) -> Posterior:
        """`observe` by native kernels, in float32; keep (B, T, 1)."""
        layer, width, last = self.posterior[0], self.config.deter, self.posterior_out
        assert isinstance(layer, nets.Layer)
        weight = layer.linear.weight  # (U, D + E)
        token_part = F.linear(tokens, weight[:, width:], layer.linear.bias)  # (B, T, U)
        scan = Scan(
            keep=keep.transpose(0, 1).contiguous(),  # (T, B, 1)
            action=self.prepare_action(action * keep).transpose(0, 1).contiguous(),  # (T, B, U)
            token_part=token_part.transpose(0, 1).contiguous(),  # (T, B, U)
            noise=uniform,
            deter=state.deter,
            stoch=state.stoch.flatten(1),
        )
        posterior = PosteriorWeights(weight[:, :width], layer.norm.scale, last.weight, last.bias)
        deter, stoch, logits, index = kernels_rssm.observe(
            scan,
            self.cell_weights(torch.float32),
            posterior,
            self.config.unimix,
            self.config.stoch,
        )
        classes = (self.config.stoch, self.config.classes)
        stoch, logits = stoch.unflatten(-1, classes), logits.unflatten(-1, classes)
        return Posterior(*(x.transpose(0, 1) for x in (deter, stoch, index, logits)))

    def cell_weights(self, dtype: torch.dtype) -> CellWeights:
        """The cell's parameters as the native loops want them, matrices in `dtype`."""
        deter, stoch = self.deter_in, self.stoch_in
        width = self.config.deter // self.config.blocks
        cell = self.cell_in.weight  # (G, D / G + 3U, D / G)
        shared = cell[:, width:].transpose(0, 1).flatten(1)  # (3U, D)
        return CellWeights(
            *(deter.linear.weight.to(dtype), deter.linear.bias.to(dtype), deter.norm.scale),
            *(stoch.linear.weight.to(dtype), stoch.linear.bias.to(dtype), stoch.norm.scale),
            *(shared.to(dtype), cell[:, :width].to(dtype), self.cell_in.bias.to(dtype)),
            *(self.cell_norm.scale, self.gates.weight.to(dtype), self.gates.bias),
        )

    @torch.no_grad()
    def transition(self, n: int) -> Transition:
        """A function that does `imagine_step` for n rows, from features to features."""
        deter = self.config.deter
        if self._native(self.prior_out.weight):
            return self._transition_native(n)

        def step(feat: Tensor, action: Tensor, uniform: Tensor | None, out: Tensor) -> None:
            stoch = feat[:, deter:].unflatten(1, (self.config.stoch, -1))
            state = self.imagine_step(State(feat[:, :deter], stoch), action, uniform)
            out.copy_(torch.cat([state.deter, state.stoch.flatten(1)], 1))

        return step

    def _transition_native(self, n: int) -> Transition:
        dtype = nets.compute_dtype(self.prior_out.weight.device)
        weights, deter = self.cell_weights(dtype), self.config.deter
        buffers = CellBuffers.empty((n,), weights, dtype)
        index = torch.empty(n, self.config.stoch, dtype=torch.int64)
        unimix = torch.tensor([self.config.unimix])

        def step(feat: Tensor, action: Tensor, uniform: Tensor | None, out: Tensor) -> None:
            embedded = self.prepare_action(action)
            kernels_rssm.cell_into(
                weights, buffers, feat[:, :deter], feat[:, deter:], embedded, out[:, :deter]
            )
            logits = self.prior_out(self.prior(out[:, :deter])).float()
            kernels_rssm.sample_into(logits, uniform, out[:, deter:], index, unimix)

        return step


class DenseRSSM(RSSM):
    """`cell="gru"`: the same with the LayerNorm GRU of the first DreamerV3 (arXiv v1, appendix).

    (reset, cand, update) = LayerNorm(W [Layer([stoch, action]), deter] + b)
    """

    def _build_cell(self, action: int) -> None:
        c = self.config
        self.inputs = nets.Layer(c.stoch * c.classes + action, c.hidden, c.norm)
        self.dense_gates = nets.Linear(c.hidden + c.deter, 3 * c.deter)
        self.gates_norm = nets.LayerNorm(3 * c.deter)

    def _native(self, x: Tensor) -> bool:
        return False

    def prepare_action(self, action: Tensor) -> Tensor:
        """Encoded action (n, A), scaled into [-1, 1] elementwise; no embedding."""
        return action / action.detach().abs().clamp(min=1.0)

    def cell(self, state: State, action: Tensor) -> Tensor:
        """One step of the GRU: (deter, stoch) and scaled action (n, A) -> deter (n, D)."""
        x = self.inputs(torch.cat([state.stoch.flatten(1), action], -1))  # (n, U)
        gates = self.dense_gates(torch.cat([x.float(), state.deter], -1))  # (n, 3D)
        return gated(state.deter, *self.gates_norm(gates).float().chunk(3, -1))
