"""What an experiment leaves in the repository: curves as CSV, a summary, a picture, table rows."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from experiments import EXPERIMENTS, Experiment
from reproduce_runs import SeedRun, write_json

from rllib_dreamer.atomic import write_text
from rllib_dreamer.cli.plot import find_references
from rllib_dreamer.evaluation import plots
from rllib_dreamer.evaluation.curves import Curve, Reference, Trial
from rllib_dreamer.evaluation.statistics import decimals, mean, stratified_bootstrap

BEGIN, END = "<!-- results: written by make reproduce -->", "<!-- end of results -->"
COLUMNS = (
    *("experiment", "task and protocol", "stop", "env steps", "seeds"),
    *("greedy return, 95 % interval", "seed by seed", "training return", "official there"),
    *("hours", "CPU-hours", "hardware", "commit"),
)
CSV_COLUMNS = ("env_steps", "hours", "episode_return")


class Results(NamedTuple):
    """Where results go: a folder with one folder per experiment, and the page with the table."""

    folder: Path
    page: Path

    def write(self, name: str, experiment: Experiment, runs: list[SeedRun]) -> None:
        """Writes everything of an experiment, as far as it has been run.

        Args:
            name: The experiment's name.
            experiment: The experiment.
            runs: Its seeds, of which at least one was evaluated at the first stop.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        begun = [run for run in runs if run.evaluated(0)]
        trials = {run.seed: run.curve() for run in begun}
        for seed, trial in trials.items():
            write_curve(folder / f"seed_{seed}.csv", trial)
        summary = summarize(experiment, begun, trials)
        write_json(folder / "summary.json", summary)
        (folder / "curve.png").write_bytes(self.picture(name, experiment))
        write_rows(self.page, name, table_rows(name, experiment, summary))

    def picture(self, name: str, experiment: Experiment) -> bytes:
        """Draws the curves over env steps and hours, beside the published one and the baseline."""
        found = [self.curve(name)]
        baseline = experiment.baseline
        if baseline is not None and (self.folder / baseline / "summary.json").is_file():
            found.append(self.curve(baseline))
        reference = published(experiment, found[0].env)
        figure, axes = plots.new_figure(1, 2)
        for axis, x_axis in zip(axes[0], ("env_steps", "hours"), strict=True):
            plots.draw_learning_curves(axis, found, reference, x_axis)
        return plots.to_png(figure)

    def curve(self, name: str) -> Curve:
        """Reads the curve of an experiment from its files, of the seeds in its summary."""
        folder = self.folder / name
        summary = json.loads((folder / "summary.json").read_text())
        env, seeds = summary["env"], summary["stops"][0]["seeds"]
        paths = [folder / f"seed_{seed['seed']}.csv" for seed in seeds]
        tables = [np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2).T for path in paths]
        trials = [Trial(p.stem, env, *table) for p, table in zip(paths, tables, strict=True)]
        return Curve(name, env, trials)


def write_curve(path: Path, trial: Trial) -> None:
    """Writes a learning curve: one row for each result that training reported."""
    columns = (trial.env_steps, trial.hours, trial.episode_return)
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(CSV_COLUMNS)
        for steps, hours, value in zip(*columns, strict=True):
            table.writerow([f"{steps:.0f}", f"{hours:.5f}", f"{value:.6g}"])


def summarize(
    experiment: Experiment, runs: list[SeedRun], trials: Mapping[int, Trial]
) -> dict[str, Any]:
    """Everything that was measured, in plain dicts and numbers.

    The interval is a bootstrap over episodes within each seed: it tells how well the policies
    were measured, not how much other seeds would differ.

    Args:
        experiment: The experiment.
        runs: Its seeds.
        trials: Their learning curves, by seed.
    """
    stops = []
    for number, stop in enumerate(experiment.stops):
        done = [run for run in runs if run.evaluated(number)]
        seeds = [_summarize_seed(run, number, trials[run.seed]) for run in done]
        if seeds:
            returns = [np.array(seed["episode_returns"]) for seed in seeds]
            interval = stratified_bootstrap(returns, mean)
            value = float(np.concatenate(returns).mean())
            stops.append({"stop": stop, "return": value, "interval": interval, "seeds": seeds})
    return {"env": trials[runs[0].seed].env, **experiment._asdict(), "stops": stops}


def _summarize_seed(run: SeedRun, stop: int, trial: Trial) -> dict[str, Any]:
    metrics, stretches = run.evaluate(stop), run.stretches(stop)
    env_steps = metrics["policy"]["agent_steps"] * metrics["action_repeat"]
    return {
        "seed": run.seed,
        "return": metrics["returns"]["mean"],
        "episode_returns": metrics["episode_returns"],
        "training_return": float(np.interp(env_steps, trial.env_steps, trial.episode_return)),
        "env_steps": env_steps,
        "hours": sum(s.seconds for s in stretches) / 3600,
        "cpu_hours": sum(s.cpu_seconds for s in stretches) / 3600,
        "stretches": [stretch._asdict() for stretch in stretches],
    }


def published(experiment: Experiment, env: str) -> Reference | None:
    """The published curve to hold an experiment against, if there is one."""
    return find_references([env], experiment.reference).get(env)


def table_rows(name: str, experiment: Experiment, summary: dict[str, Any]) -> list[str]:
    """The rows of the table, one for each stop that was reached."""
    reference = published(experiment, summary["env"])
    return [_row(name, experiment, measured, reference) for measured in summary["stops"]]


def _row(
    name: str, experiment: Experiment, measured: dict[str, Any], reference: Reference | None
) -> str:
    seeds = measured["seeds"]
    stretches = [stretch for seed in seeds for stretch in seed["stretches"]]
    steps = np.mean([seed["env_steps"] for seed in seeds])
    hours, cpu_hours = (np.mean([seed[key] for seed in seeds]) for key in ("hours", "cpu_hours"))
    places = decimals([value for seed in seeds for value in seed["episode_returns"]])
    value, low, high = (f"{x:.{places}f}" for x in (measured["return"], *measured["interval"]))
    there = math.nan if reference is None else reference.mean_at(float(steps))
    pieces = f" ({len(stretches)} stretches)" if len(stretches) > len(seeds) else ""
    cells = (
        f"[{name}](../results/{name}/summary.json)",
        experiment.protocol,
        ", ".join(f"{limit:,} {key}" for key, limit in measured["stop"].items()),
        f"{steps:,.0f}",
        f"{len(seeds)} of {len(experiment.seeds)}",
        f"{value}, {low} to {high}",
        *(
            ", ".join(f"{s[key]:.{places}f}" for s in seeds)
            for key in ("return", "training_return")
        ),
        "-" if math.isnan(there) else f"{there:.{places}f}",
        f"{hours:.2f}{pieces}",
        f"{cpu_hours:.2f}",
        *(", ".join(dict.fromkeys(s[key] for s in stretches)) for key in ("hardware", "commit")),
    )
    return _line(cells)


def write_rows(page: Path, name: str, rows: list[str]) -> None:
    """Puts the rows of an experiment into the table of a page, in place of earlier ones.

    Args:
        page: A Markdown file with the lines `BEGIN` and `END`.
        name: The experiment.
        rows: Its rows.

    Raises:
        ValueError: If the page has no such lines.
    """
    text = page.read_text()
    head, begin, rest = text.partition(BEGIN)
    old, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} needs the lines {BEGIN!r} and {END!r}: put them in.")
    table: dict[str, list[str]] = {}
    for line in old.splitlines():
        if line.startswith("| ["):
            table.setdefault(line[3:].partition("]")[0], []).append(line)
    table[name] = rows
    order = sorted(table, key=[*EXPERIMENTS, *table].index)
    header = [_line(COLUMNS), "|" + "---|" * len(COLUMNS)]
    body = "\n".join([*header, *(row for owner in order for row in table[owner])])
    write_text(page, f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}")


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
