"""One update of ours on a synthetic batch, as a program to be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from common import PRECISIONS, timed
from torch.utils.flop_counter import FlopCounterMode

from rllib_dreamer.hardware import keep_memory
from rllib_dreamer.model import ops
from rllib_dreamer.model.agent import Agent, build_agent
from rllib_dreamer.model.cuda_graphs import Captured, CudaRecorder
from rllib_dreamer.model.optim import LaProp
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ObsSpec, model_config

ACTION = 6
FRAME = (64, 64, 3)
VECTOR = 24


class Case(NamedTuple):
    """What one update is; threads=0 leaves their number to PyTorch."""

    size: str = "12M"
    obs: str = "image"
    precision: str = "float32"
    compile: bool = True
    cuda_graphs: bool = False
    threads: int = 0
    device: str = "cpu"
    batch: int = 16
    length: int = 64


def prepare(threads: int) -> None:
    """Sets up a process as a learner does: threads (0: leave them), denormal numbers, memory."""
    set_up_numbers(threads)
    keep_memory()


def set_up_numbers(threads: int) -> None:
    """Threads (0: leave them), and denormal numbers to zero."""
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)


def observation_spec(obs: str) -> dict[str, ObsSpec]:
    """The observation leaf of that kind."""
    return {obs: ObsSpec(obs, FRAME if obs == "image" else (VECTOR,))}


def build(case: Case, device: str) -> Agent:
    """The agent of a case."""
    actions = {"action": ActionSpec("continuous", ACTION)}
    config, dtype = model_config(case.size), PRECISIONS[case.precision]
    agent = build_agent(observation_spec(case.obs), actions, config, LossConfig(), dtype)
    agent.fuse = case.compile
    return agent.to(device)


def synthetic_batch(case: Case, deter: int, device: str) -> dict[str, torch.Tensor]:
    """A replay batch of noise, without episode ends."""
    shape = (case.batch, case.length + 1)
    flags = torch.zeros(shape, dtype=torch.bool)
    batch = {
        "action/action": torch.rand(*shape, ACTION) * 2 - 1,
        "reward": torch.rand(shape),
        "is_first": flags,
        "is_last": flags,
        "is_terminal": flags,
        "deter": torch.zeros(*shape, deter),
        "stoch": torch.zeros(*shape, 32, dtype=torch.uint8),
    }
    batch |= {f"obs/{key}": x for key, x in observation(case.obs, shape).items()}
    return {key: x.to(device) for key, x in batch.items()}


def observation(obs: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Noise of that kind."""
    if obs == "image":
        return {obs: torch.randint(0, 256, (*shape, *FRAME), dtype=torch.uint8)}
    return {obs: torch.randn(*shape, VECTOR)}


class Update:
    """One update of ours at every call; on CUDA it returns when the device is done."""

    def __init__(self, case: Case) -> None:
        prepare(case.threads)
        torch.manual_seed(0)
        self.case, self.agent = case, build(case, case.device)
        self.batch = synthetic_batch(case, self.agent.world.config.deter, case.device)
        self.parameters = [p for p in self.agent.parameters() if p.requires_grad]
        self.optimizer = LaProp(self.parameters, fused=case.compile)
        self.forward_backward: Callable[[Mapping[str, torch.Tensor]], None] = self._pass
        if case.cuda_graphs:
            self.forward_backward = Captured(self._pass, CudaRecorder(case.device))

    def _pass(self, batch: Mapping[str, torch.Tensor]) -> None:
        output = self.agent(batch)
        self.optimizer.zero_grad()
        ops.total_loss(output.losses, self.agent.scales).backward()

    def __call__(self) -> None:
        """Does it."""
        self.forward_backward(self.batch)
        self.optimizer.step()
        self.agent.behavior.update_slow_critic()
        if self.case.device == "cuda":
            torch.cuda.synchronize()


def count_flop(case: Case) -> float:
    """Floating-point operations of the matrix products and convolutions of one update.

    Counted on one row of eight steps; all but one in a few hundred are proportional to B * T.
    """
    few = case._replace(compile=False, precision="float32", batch=1, length=8)
    agent = build(few, "cpu")
    batch = synthetic_batch(few, agent.world.config.deter, "cpu")
    with FlopCounterMode(display=False) as counter:
        ops.total_loss(agent(batch).losses, agent.scales).backward()
    return float(counter.get_total_flops()) * case.batch * case.length / 8


def matmul_ceiling(case: Case) -> float:
    """FLOP/s of a product of 2048 x 2048 matrices, the best of ten."""
    x = torch.randn(2048, 2048, dtype=PRECISIONS[case.precision], device=case.device)

    def product() -> None:
        torch.mm(x, x)
        if case.device == "cuda":
            torch.cuda.synchronize()

    return 2 * 2048**3 / min(timed(product).wall for _ in range(10))
