"""Learner: one loss, one backward, the optimizer, the slow critic, what several learners share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from torch import Tensor

from rllib_dreamer.dreamer_config import DreamerConfig
from rllib_dreamer.dreamer_torch_rl_module import DreamerTorchRLModule
from rllib_dreamer.hardware import prepare_cpu, resolve_precision
from rllib_dreamer.model import ops
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.cuda_graphs import Captured, CudaRecorder
from rllib_dreamer.model.optim import FLUSHED_EPS, OFFICIAL_EPS, Adam, LaProp
from rllib_dreamer.part_rates import PARTS

GRAD_NORM = (DEFAULT_MODULE_ID, "grad_norm")
UPDATE_NORM = (DEFAULT_MODULE_ID, "update_norm")
OPTIMIZER_SETTINGS = ("agc", "eps", "warmup", "weight_decay")


class PassOutput(NamedTuple):
    """What a forward and a backward pass give: losses and latents by module, gradients, metrics."""

    losses: dict[str, Tensor]
    gradients: dict[Any, Tensor]
    latents: dict[str, tuple[Tensor, Tensor]]
    measured: dict[tuple[str, str], Tensor]


class DreamerTorchLearner(TorchLearner):
    """Updates the agent from replay batches.

    The three optimizers exist only so that each may have its own learning rate or schedule: LaProp
    with its clipping, and Adam too, work tensor by tensor, so they are one optimizer in three
    parts, stepped after one backward. `grad_clip_norm` counts all parts together.
    """

    config: DreamerConfig

    def build(self) -> None:
        """Builds modules and optimizers and lets the agents see the other learners."""
        prepare_cpu(self.config)
        self._latents: dict[str, tuple[Tensor, Tensor]] = {}
        self._measured: dict[tuple[str, str], Tensor] = {}  # scalars of the losses
        self._normalizer_states: dict[str, dict[str, Tensor]] = {}
        super().build()
        for module_id in self.module.keys():
            agent = self.agent(module_id)
            agent.dtype = resolve_precision(self.config.precision, self._device)
            if self.distributed:
                agent.behavior.gather = all_gather
        if self.distributed and self.config.seed is not None:
            torch.manual_seed(self.config.seed + torch.distributed.get_rank())
        self._captured: Captured[tuple[str, str], PassOutput] | None = None
        if self.config.cuda_graphs and self._device.type == "cuda":
            self._captured = Captured(self._pass, CudaRecorder(self._device))

    def agent(self, module_id: str = DEFAULT_MODULE_ID) -> Agent:
        """The agent of a module, out of its DDP wrapper."""
        module = self.module[module_id].unwrapped()
        assert isinstance(module, DreamerTorchRLModule)
        return module.agent

    def configure_optimizers_for_module(
        self, module_id: str, config: DreamerConfig | None = None
    ) -> None:
        """Registers an optimizer each for world model, actor and critic."""
        config = config or self.config
        agent = self.agent(module_id)
        parts = dict(
            zip(PARTS, (agent.world, agent.behavior.actor, agent.behavior.critic), strict=True)
        )
        for name, part in parts.items():
            params = list(part.parameters())
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=make_optimizer(params, config, self._device),
                params=params,
                lr_or_lr_schedule=getattr(config, f"{name}_lr"),
            )

    def before_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Keeps the return normalisers, which the losses move before anyone sees the gradients."""
        super().before_gradient_based_update(timesteps=timesteps)
        for module_id in self.module.keys():
            state = self.agent(module_id).behavior.normalizer.state_dict()
            self._normalizer_states[module_id] = {name: x.clone() for name, x in state.items()}

    def _uncompiled_update(
        self, batch: dict[str, dict[str, Tensor]], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
        """RLlib's, with its forward and backward pass as a CUDA graph if there is to be one."""
        if self._captured is None:
            return super()._uncompiled_update(batch, **kwargs)
        done = self._captured(
            {(module_id, key): x for module_id, part in batch.items() for key, x in part.items()}
        )
        self._latents, self._measured = dict(done.latents), dict(done.measured)
        for ref, grad in done.gradients.items():
            self._params[ref].grad = grad
        self.apply_gradients(self.postprocess_gradients(done.gradients))
        return {}, done.losses, {}

    def _pass(self, batch: Mapping[tuple[str, str], Tensor]) -> PassOutput:
        """All of an update before the optimizer, on tensors by module and column."""
        parts: dict[str, dict[str, Tensor]] = {}
        for (module_id, key), x in batch.items():
            parts.setdefault(module_id, {})[key] = x
        losses = self.compute_losses(fwd_out=self.module.forward_train(parts), batch=parts)
        gradients = self.compute_gradients(losses)
        losses = {module_id: x.detach() for module_id, x in losses.items()}
        return PassOutput(losses, gradients, self._latents, self._measured)

    def compute_loss_for_module(
        self,
        *,
        module_id: str,
        config: DreamerConfig,
        batch: dict[str, Any],
        fwd_out: dict[str, Any],
    ) -> Tensor:
        """Weighs the losses into one; keeps the latents that go back to the replay."""
        self._latents[module_id] = fwd_out["deter"], fwd_out["stoch"]
        losses: dict[str, Tensor] = fwd_out["losses"]
        scales = self.agent(module_id).scales
        metrics = {f"loss_{name}": x.detach().float().mean() for name, x in losses.items()}
        for name, x in (metrics | fwd_out["metrics"]).items():
            self._measured[module_id, name] = x
        return ops.total_loss(losses, scales)

    def _log(self, measured: dict[tuple[str, str], Tensor]) -> None:
        """Logs scalars by module and name, brought to the host in one transfer."""
        values = torch.stack([x.detach().float() for x in measured.values()]).tolist()
        for key, value in zip(measured, values, strict=True):
            self.metrics.log_value(key, value, window=1)

    def postprocess_gradients(self, gradients_dict: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """Nothing: clipping is part of LaProp and of `apply_gradients`."""
        return gradients_dict

    def apply_gradients(self, gradients_dict: dict[Any, Tensor]) -> None:
        """Steps the optimizers, or skips the update if a gradient is not finite."""
        norm = torch.nn.utils.get_total_norm([g for g in gradients_dict.values() if g is not None])
        measured = self._measured | {GRAD_NORM: norm}
        finite = math.isfinite(norm)  # here the host waits for the device
        skipped = int(not finite and self._is_first)  # RLlib adds up what the learners count
        self.metrics.log_value(
            (DEFAULT_MODULE_ID, "skipped_updates"), skipped, reduce="lifetime_sum"
        )
        if finite:
            measured[UPDATE_NORM] = self._step(norm)
        else:
            self._skip_update()
        self._log(measured)

    def _step(self, norm: Tensor) -> Tensor:
        """Steps the optimizers with gradients of this norm; returns that of the change."""
        if self.config.grad_clip_norm is not None:
            params = self._params.values()
            torch.nn.utils.clip_grads_with_norm_(params, self.config.grad_clip_norm, norm)
        cfg = self.config
        trained = {"world_model": True, "actor": cfg.train_actor, "critic": cfg.train_critic}
        steps = []
        for module_id, names in self._module_optimizers.items():
            for name in names:
                if not trained[name.removeprefix(f"{module_id}_")]:
                    continue  # its momentum and weight decay would move it without any gradient
                optimizer = self.get_optimizer(module_id, name)
                assert isinstance(optimizer, LaProp | Adam)
                optimizer.step()
                steps.append(optimizer.update_norm())
            self.agent(module_id).behavior.update_slow_critic()
        return torch.linalg.vector_norm(torch.stack(steps))

    def _skip_update(self) -> None:
        """Takes back what the losses changed; all learners do, as they share their gradients."""
        self._latents.clear()
        for module_id, state in self._normalizer_states.items():
            self.agent(module_id).behavior.normalizer.load_state_dict(state)

    @property
    def _is_first(self) -> bool:
        """Whether this is the only learner, or the first of several."""
        return not self.distributed or torch.distributed.get_rank() == 0

    def take_latents(self, module_id: str = DEFAULT_MODULE_ID) -> tuple[np.ndarray, ...] | None:
        """The posterior of the batch that was just learned from, to be written back to the replay.

        Returns:
            deter (B, T, D) float16 and stoch (B, T, S) uint8, nothing without `replay_context`, or
            None if the update was skipped.
        """
        if module_id not in self._latents:
            return None
        deter, stoch = self._latents.pop(module_id)
        if not self.config.replay_context:
            return ()
        return deter.half().cpu().numpy(), stoch.to(torch.uint8).cpu().numpy()

    def shutdown(self) -> None:
        """Gives a CUDA graph and its memory back, which a cycle of references would keep."""
        super().shutdown()
        self._captured = None

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state of RLlib's learner, and that of the random number generators."""
        rng = {"cpu": torch.get_rng_state().numpy()}
        if self._device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self._device).numpy()
        return super().get_state(*args, **kwargs) | {"rng": rng}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restores moments and counts; settings stay the config's, which a resumed run may change.

        The learning rate of a schedule is that of the checkpoint: it depends on steps done.

        Raises:
            ValueError: If it is the state of another kind of optimizer.
        """
        kept = {}
        for name, optimizer in self._named_optimizers.items():
            if name in state:
                _check_kind(optimizer, state[name]["state"])
            scheduled = self._optimizer_lr_schedules[optimizer].use_schedule
            keys = OPTIMIZER_SETTINGS if scheduled else ("lr", *OPTIMIZER_SETTINGS)
            kept[name] = [{k: g[k] for k in keys if k in g} for g in optimizer.param_groups]
        super()._set_optimizer_state(state)
        for optimizer in self._named_optimizers.values():
            _own_tensors(optimizer)
        for name, groups in kept.items():
            for group, settings in zip(
                self._named_optimizers[name].param_groups, groups, strict=True
            ):
                group.update(settings)

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores the state; the generators only on the first of several learners."""
        super().set_state(state)
        rng = state.get("rng", {})
        if self._is_first:
            if "cpu" in rng:
                torch.set_rng_state(torch.as_tensor(rng["cpu"], dtype=torch.uint8))
            if "cuda" in rng and self._device.type == "cuda":
                cuda = torch.as_tensor(rng["cuda"], dtype=torch.uint8)
                torch.cuda.set_rng_state(cuda, self._device)


def _check_kind(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Refuses the state of Adam for LaProp and the other way round: their moments differ."""
    ours, saved = (
        "laprop" if "agc" in x["param_groups"][0] else "adam"
        for x in (optimizer.state_dict(), state)
    )
    if ours != saved:
        raise ValueError(
            f"optimizer={ours!r} cannot go on from the state of {saved!r} in the checkpoint: set "
            f"optimizer={saved!r}."
        )


def _own_tensors(optimizer: torch.optim.Optimizer) -> None:
    """Copies the tensors of its state, which a state given by Ray shares between processes.

    RLlib moves Adam's counters of steps to the learner's device; PyTorch keeps them on the CPU.
    """
    for values in optimizer.state.values():
        tensors = {key: x for key, x in values.items() if isinstance(x, Tensor)}
        for key, x in tensors.items():
            values[key] = x.to("cpu", copy=True) if key == "step" else x.clone()


def make_optimizer(
    params: list[torch.nn.Parameter], config: DreamerConfig, device: torch.device
) -> LaProp | Adam:
    """The optimizer that the config asks for; RLlib sets its learning rate."""
    if config.optimizer == "adam":
        return Adam(params, warmup=config.warmup_updates)
    return LaProp(
        params,
        agc=config.agc,
        eps=FLUSHED_EPS if device.type == "cpu" else OFFICIAL_EPS,
        warmup=config.warmup_updates,
        weight_decay=config.weight_decay,
        fused=config.compile,
    )


def all_gather(x: Tensor) -> Tensor:
    """Concatenates a tensor (n, ...) over all learners, in rank order."""
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)
