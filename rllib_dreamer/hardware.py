"""What the machine can do: compute type and threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

PRECISIONS = ("auto", "float32", "bfloat16")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "quota period" or "max period", in microseconds
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, from malloc.h


def resolve_precision(precision: str, device: torch.device | str) -> torch.dtype:
    """Returns the compute type: bfloat16 where it is faster than float32, if left to us.

    That is on CUDA devices from Ampere on and on CPUs with AMX. A CPU that has only the bfloat16
    instructions of AVX-512 is slower with them than with float32.
    """
    device = torch.device(device)
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        fast = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return torch.bfloat16 if fast else torch.float32


def available_cpus() -> int:
    """CPUs that this process may run on, and no more than its control group (v2) grants time of."""
    known = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
        quota, period = map(int, CPU_QUOTA.read_text().split())
        return min(cpus, max(1, quota // period))
    return cpus


def prepare_cpu(config: AlgorithmConfig) -> None:
    """Sets PyTorch's threads for a learner and flushes denormal numbers to zero.

    Gradients get small enough to be denormal, with which a CPU computes many times slower.

    Ray pins a worker to as many threads as CPUs were asked for, one by default, which would leave a
    CPU learner on one core. We take `learner_threads`, else the CPUs asked for if more than one,
    else all of this machine, shared as if all learners were on it.

    A seed lets RLlib make PyTorch deterministic, which then fills every new tensor with NaN first,
    a tenth of an update. Nothing here reads a tensor before it is written.
    """
    threads = config.learner_threads
    if threads == "auto":
        if config.num_learners > 0:
            asked = config.num_cpus_per_learner
        else:
            asked = config.num_cpus_for_main_process
        several = isinstance(asked, (int, float)) and asked > 1
        threads = int(asked) if several else available_cpus() // max(1, config.num_learners)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_flush_denormal(True)  # before the threads start, they inherit it
    torch.set_num_threads(max(1, int(threads)))
    keep_memory()


def keep_memory() -> None:
    """Lets the process keep freed memory for its next tensors, where the C library can (glibc).

    By default a big tensor is mapped by the system anew and filled with zeros each time, which is
    about a tenth of an update. `release_memory` gives back what is not needed.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_memory() -> None:
    """Gives freed memory back to the system, where the C library can (glibc).

    The big tensors of a CPU update leave holes in the heap that no later update fills quite, and
    the process would grow by gigabytes an hour.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
