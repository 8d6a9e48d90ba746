"""Runs the benchmarks one after another and writes one table of all their figures.

    python benchmarks/all.py --quick --out benchmarks/results

Each runs as a command of its own, which the table names as it ran. `--quick`, as `make bench` has
it, takes the fewest rounds that give a median.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from common import HEADER, Figure, machine

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
BEGIN, END = "<!-- table begins -->\n", "<!-- table ends -->\n"

# By the name of the result: the command, and what --quick adds to it.
COMMANDS = {
    "update_12M_bfloat16": (
        "train_step.py --size 12M --precision bfloat16 --against rllib",
        "--rounds 3 --warmup 1",
    ),
    "update_12M_float32": (
        "train_step.py --size 12M --precision float32 --against rllib",
        "--rounds 3 --warmup 1",
    ),
    "update_1M_image": ("train_step.py --size 1M --against rllib", "--rounds 3 --warmup 1"),
    "update_1M_vector": (
        "train_step.py --size 1M --obs vector --against rllib",
        "--rounds 3 --warmup 1",
    ),
    "policy_step": ("policy_step.py --size 12M", "--steps 100"),
    "replay": ("replay.py", "--capacity 5000 --rounds 7"),
    "loop_image": ("loop.py --size 1M", "--updates 10"),
    "loop_vector": ("loop.py --size 1M --obs vector", "--updates 10"),
    "learners": ("learners.py --size 1M", "--rounds 3 --warmup 1"),
    "runners": ("runners.py", "--runners 0,2 --rounds 2 --seconds 2"),
    "memory": ("memory.py", "--minutes 1"),
    "env_step": ("env_step.py", "--only walker-walk --rounds 3 --seconds 1"),
}


def run(name: str, arguments: str, out: Path) -> dict[str, Any]:
    """Runs one benchmark and returns what it wrote."""
    script, *options = arguments.split()
    path = out / f"{name}.json"
    print(f"== {arguments}", flush=True)
    command = [sys.executable, str(HERE / script), *options, "--json", str(path)]
    subprocess.run(command, check=True)
    return json.loads(path.read_text())


def markdown(here: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """The table of all figures, by the commands as they ran, under the machine as it was before."""
    cpu = f"{here['cpu']}, {here['cores']} cores, {', '.join(here['flags'])}"
    load = ", ".join(map(str, here["load"]))
    lines = [
        f"{here['date']}; {cpu}; {here['memory_gib']} GiB; GPU: {here['gpu'] or 'none'}; Python "
        f"{here['python']}, torch {here['torch']}. Load averages before it began: {load}.",
        "",
        f"| {' | '.join(HEADER)} |",
        "| --- | ---: | ---: | --- | ---: | --- | --- |",
    ]
    for command, result in results.items():
        lines.append(f"| **`{command}`** |" + " |" * (len(HEADER) - 1))
        for row in result["figures"]:
            row.pop("met")
            lines.append(f"| {' | '.join(Figure(**row).cells())} |")
    return "\n".join(lines) + "\n"


def publish(table: str) -> None:
    """Puts the table in the place that README.md has for it."""
    head, _, rest = README.read_text().partition(BEGIN)
    README.write_text(head + BEGIN + "\n" + table + "\n" + END + rest.partition(END)[2])


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A short set, few rounds.")] = False,
    only: Annotated[str, typer.Option(help="Only those with this in their name.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = HERE / "results",
    to_readme: Annotated[bool, typer.Option("--publish", help="Table to README.md too.")] = False,
) -> None:
    """Runs everything and writes `table.md`, and one JSON file for each command."""
    names = [name for name in COMMANDS if only in name]
    if not names:
        raise typer.BadParameter(f"{only!r} is in none of the names {', '.join(COMMANDS)}")
    if to_readme and only:
        raise typer.BadParameter("--publish replaces the whole table: leave --only away")
    out.mkdir(parents=True, exist_ok=True)
    here, results = machine(), {}
    for name in names:
        command, few = COMMANDS[name]
        arguments = f"{command} {few}" if quick else command
        results[arguments] = run(name, arguments, out)
    table = markdown(here, results)
    (out / "table.md").write_text(table)
    if to_readme:
        publish(table)
    print(f"The table is in {out / 'table.md'}")


if __name__ == "__main__":
    typer.run(main)
