"""Times one update, and with --against rllib the one of RLlib's own DreamerV3 beside it.

    python benchmarks/train_step.py --size 12M --against rllib --json train_step.json

An update is what a learner does with one batch: world model, H=15 imagined steps, actor and critic,
optimizer, slow critic. Envs and replay are left out, the batch is synthetic. Every program runs in
a fresh process; with --against the two take turns, update by update, and the ratio of each turn is
taken. RLlib's is its XS model on images, the smallest that its documentation uses.
"""

from __future__ import annotations

import statistics
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from common import (
    Device,
    Figure,
    Observation,
    Precision,
    Program,
    Sample,
    figure,
    median_ratio,
    peak_rss_gib,
    report,
    take_turns,
)
from updates import Case, Update, count_flop, matmul_ceiling

from rllib_dreamer.model.cuda_graphs import WARMUP

# What the project wants: time beside RLlib XS, and memory, by size, observation and compute type.
TARGET_RATIOS = {
    ("12M", "image", "bfloat16"): 0.15,
    ("12M", "image", "float32"): 0.6,
    ("1M", "image", "bfloat16"): 0.09,
    ("1M", "image", "float32"): 0.09,
    ("1M", "vector", "float32"): 0.035,
}
ON_CUDA = (("launches", "launches", ""), ("peak_device_gib", "device memory", "GiB"))
TARGET_GIB = {("12M", "image", "bfloat16"): 2.5}


class Rival(str, Enum):
    """Another program that does an update of the same shape."""

    rllib = "rllib"


def describe(update: Any) -> dict[str, float]:
    """What is known of a program after its updates."""
    return {
        "parameters": sum(p.numel() for p in update.parameters),
        "peak_rss_gib": peak_rss_gib(),
        "threads": torch.get_num_threads(),
    }


def describe_ours(update: Update) -> dict[str, float]:
    """The same of ours, with its operations beside the machine's ceiling."""
    found = describe(update)
    if update.case.device == "cuda":
        found |= describe_cuda(update)
    return found | {"flop": count_flop(update.case), "ceiling": matmul_ceiling(update.case)}


def describe_cuda(update: Update) -> dict[str, float]:
    """Memory on the device, GiB, and how often an update launches something there."""
    peak = torch.cuda.max_memory_reserved() / 2**30  # a graph's memory counts as reserved only
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        update()
    events = profile.key_averages()
    launches = sum(e.count for e in events if "Launch" in e.key and e.key.startswith("cu"))
    return {"peak_device_gib": peak, "launches": launches}


class Measured(NamedTuple):
    """One program: its samples, and what `describe` says."""

    samples: list[Sample]
    about: dict[str, float]


def measure(case: Case, against: Rival | None, rounds: int, warmup: int) -> dict[str, Measured]:
    """Times a case, "ours", and its rival in turn."""
    programs = {"ours": Program(Update, case)}
    if against:
        from rllib_xs import RLlibUpdate

        programs[against.value] = Program(RLlibUpdate, case)
    try:
        samples = take_turns(programs, rounds, warmup)
        about = {
            name: program.ask(describe_ours if name == "ours" else describe)
            for name, program in programs.items()
        }
    finally:
        for program in programs.values():
            program.close()
    return {name: Measured(samples[name], about[name]) for name in programs}


def figures(case: Case, measured: dict[str, Measured]) -> list[Figure]:
    """The rows: time beside the rival's, CPU time, memory, rate."""
    ours, rival = measured["ours"], measured.get("rllib")
    kind = case.size, case.obs, case.precision
    wall, name = [s.wall for s in ours.samples], " ".join(kind)
    beside: dict[str, Any] = {}
    if rival:
        theirs = [s.wall for s in rival.samples]
        beside["beside"] = f"RLlib XS image float32 {statistics.median(theirs):.3g} s"
        beside |= {"ratio": median_ratio(wall, theirs), "target_ratio": TARGET_RATIOS.get(kind)}
    rate, ceiling = ours.about["flop"] / statistics.median(wall) / 1e9, ours.about["ceiling"] / 1e9
    memory = ours.about["peak_rss_gib"]
    unit, factor = ("ms", 1e3) if case.device == "cuda" else ("s", 1.0)
    return [
        figure(f"update {name}", [factor * x for x in wall], unit, **beside),
        figure(f"update {name}, CPU time", [s.cpu for s in ours.samples], "s"),
        Figure(f"update {name}, peak RSS", memory, "GiB", target=TARGET_GIB.get(kind)),
        Figure(
            f"update {name}, rate",
            rate,
            "GFLOP/s",
            beside=f"matmul {ceiling:.0f} GFLOP/s",
            ratio=rate / ceiling,
        ),
        *(
            Figure(f"update {name}, {what}", ours.about[key], unit)
            for key, what, unit in ON_CUDA
            if key in ours.about
        ),
    ]


def main(
    size: Annotated[str, typer.Option(help="Model size, 1M ... 400M.")] = "12M",
    obs: Annotated[Observation, typer.Option(help="Observation.")] = Observation.image,
    precision: Annotated[Precision, typer.Option(help="Compute type.")] = Precision.float32,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Fused forms.")] = True,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="On CUDA, as one graph.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads; 0 leaves it to PyTorch.")] = 0,
    device: Annotated[Device, typer.Option(help="Device.")] = Device.cpu,
    batch: Annotated[int, typer.Option(help="Rows, B.")] = 16,
    length: Annotated[int, typer.Option(help="Steps of a row, T.")] = 64,
    rounds: Annotated[int, typer.Option(help="Updates timed.")] = 5,
    warmup: Annotated[int, typer.Option(help="Updates before that.")] = 2,
    against: Annotated[Rival | None, typer.Option(help="Another program, in turn.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Writes the figures.")] = None,
) -> None:
    """Times one update."""
    if cuda_graphs and device is not Device.cuda:
        raise typer.BadParameter("there are CUDA graphs with --device cuda only")
    case = Case(
        *(size, obs.value, precision.value, compile_, cuda_graphs),
        *(threads, device.value, batch, length),
    )
    measured = measure(case, against, rounds, warmup + (WARMUP + 1 if cuda_graphs else 0))
    ours = measured["ours"].about
    title = (
        f"one update, {size} ({ours['parameters'] / 1e6:.2f} M parameters), B={batch}, T={length}, "
        f"{ours['threads']} threads, {'fused' if compile_ else 'plain'}"
        f"{', CUDA graph' if cuda_graphs else ''}"
    )
    details = {name: found._asdict() for name, found in measured.items()}
    report(title, figures(case, measured), json_, case=case._asdict(), programs=details)


if __name__ == "__main__":
    typer.run(main)
