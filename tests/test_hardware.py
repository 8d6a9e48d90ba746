from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rllib_dreamer import hardware


@pytest.fixture(autouse=True)
def keep_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def set_threads(**settings: Any) -> int:
    defaults = {
        "learner_threads": "auto",
        "num_learners": 0,
        "num_cpus_per_learner": "auto",
        "num_cpus_for_main_process": 1,
    }
    hardware.prepare_cpu(SimpleNamespace(**{**defaults, **settings}))  # type: ignore[arg-type]
    return torch.get_num_threads()


def test_a_given_precision_is_taken() -> None:
    assert hardware.resolve_precision("float32", "cpu") is torch.float32
    assert hardware.resolve_precision("bfloat16", "cpu") is torch.bfloat16


@pytest.mark.parametrize(("amx", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_of_a_cpu(
    amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert hardware.resolve_precision("auto", "cpu") is dtype


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float32), (9, torch.bfloat16)])
def test_auto_precision_of_a_gpu(
    major: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert hardware.resolve_precision("auto", "cuda") is dtype


def test_given_threads_are_taken() -> None:
    assert set_threads(learner_threads=3) == 3


def test_auto_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_cpus", lambda: 8)
    assert set_threads() == 8
    assert set_threads(num_cpus_for_main_process=3) == 3
    assert set_threads(num_learners=2) == 4
    assert set_threads(num_learners=2, num_cpus_per_learner=3) == 3
    assert set_threads(num_learners=16) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", 8),
        ("350000 100000\n", 3),
        ("50000 100000\n", 1),
        ("1600000 100000\n", 8),
        (None, 8),
    ],
)
def test_available_cpus_are_those_of_the_affinity_and_of_the_quota(
    text: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    if text is not None:
        quota.write_text(text)
    monkeypatch.setattr(hardware, "CPU_QUOTA", quota)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert hardware.available_cpus() == expected


def test_denormal_numbers_are_flushed() -> None:
    try:
        set_threads(learner_threads=1)
        tiny = torch.tensor([1e-38]) * 1e-2
        assert tiny.item() == 0.0
    finally:
        torch.set_flush_denormal(False)


def test_with_a_seed_new_tensors_are_not_filled() -> None:
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)  # as RLlib does with a seed
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        assert torch.empty(1000).isnan().all()
        set_threads(learner_threads=1)
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(False)
        torch.set_flush_denormal(False)


FAULTS_OF_FIVE_TENSORS = """
import ctypes, resource, sys, torch
from rllib_dreamer import hardware

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault of each page of 4 kB
if sys.argv[1] == "keep":
    hardware.keep_memory()
first = torch.ones(16 * 2**20)  # 64 MiB
del first
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept_for_the_next_tensors() -> None:
    words = [sys.executable, "-c", FAULTS_OF_FIVE_TENSORS]
    done = [subprocess.run([*words, how], capture_output=True, text=True) for how in ("keep", "no")]
    kept, not_kept = (int(process.stdout) for process in done)
    assert kept < 20_000 < 80_000 < not_kept  # 64 MiB are 16,384 pages
