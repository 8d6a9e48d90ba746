"""The `rllib plot` sub-command: learning curves of runs beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from rllib_dreamer.cli.errors import CommandError
from rllib_dreamer.evaluation import curves, plots, report
from rllib_dreamer.evaluation.statistics import decimals

_CAPTION = (
    "Thin lines are seeds, the thick line is their mean, the band reaches from the lowest to the "
    "highest. A return is the mean over the latest episodes, as the environment runners report it."
)

_BLANK = "-"


def plot(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Folder of a Tune experiment or trial, or LABEL=FOLDER; runs with the same "
            "label are drawn as seeds of one curve.",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(help=f"Published curves to draw beside: {', '.join(curves.REFERENCES)}."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task of the reference, if the environment's name does not tell it."),
    ] = None,
    save_dir: Annotated[
        Path, typer.Option(help="Where learning_curves.png and report.html go.")
    ] = Path("plots"),
) -> None:
    """Draw learning curves of RUNs over env steps and hours."""
    try:
        paths = write_learning_curves(runs, save_dir, reference=reference, task=task)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"--save-dir: {error}") from error
    for path in paths:
        typer.echo(str(path))


def write_learning_curves(
    runs: Sequence[str], save_dir: Path, *, reference: str | None = None, task: str | None = None
) -> list[Path]:
    """Writes the learning curves of runs as a PNG and as an HTML page.

    Args:
        runs: each "path" or "label=path", see `curves.read_curves`.
        save_dir: folder for `learning_curves.png` and `report.html`.
        reference: a published set of curves, see `curves.REFERENCES`, or None.
        task: task of the reference for all runs; None finds it by the environment's name.

    Returns:
        The files written.

    Raises:
        ValueError: if a run holds no results, the reference or its task is unknown, or no run
            is of a task in the reference.
    """
    found = curves.read_curves(runs)
    groups: dict[str, list[curves.Curve]] = {}
    for curve in found:
        groups.setdefault(curve.env, []).append(curve)
    references = find_references(list(groups), reference, task)
    figure, axes = plots.new_figure(len(groups), 2)
    for row, (env, group) in zip(axes, groups.items(), strict=True):
        for axis, x_axis in zip(row, ("env_steps", "hours"), strict=True):
            plots.draw_learning_curves(axis, group, references.get(env), x_axis)
            axis.set_title(env or "unknown environment")
    page = report.Report(
        title="Learning curves",
        subtitle=", ".join(runs),
        numbers=[],
        sections=[_section(env, group, references.get(env)) for env, group in groups.items()],
        footer=_footer(reference),
    )
    page_path = report.write_report(save_dir / "report.html", page)
    picture_path = save_dir / "learning_curves.png"
    picture_path.write_bytes(plots.to_png(figure))
    return [picture_path, page_path]


def find_references(
    envs: Sequence[str], reference: str | None, task: str | None = None
) -> dict[str, curves.Reference]:
    """Finds the published curve of each environment.

    Args:
        envs: names of environments.
        reference: a published set of curves, see `curves.REFERENCES`, or None.
        task: task of the reference for all environments; None goes by their names.

    Returns:
        Environment -> published curve, without those that have none.

    Raises:
        ValueError: if `task` is given without `reference`, or nothing matches.
    """
    if reference is None:
        if task is not None:
            raise ValueError(f"task: got {task!r} without a reference; add --reference NAME.")
        return {}
    published = curves.load_reference(reference)
    names = {env: task or curves.reference_task(env) for env in envs}
    matches = {env: published[name] for env, name in names.items() if name in published}
    if not matches:
        raise ValueError(
            f"reference: {reference} has no curve for {', '.join(sorted(set(names.values())))}; "
            f"it has {', '.join(sorted(published))}: choose one with --task."
        )
    return matches


def _section(
    env: str, group: Sequence[curves.Curve], reference: curves.Reference | None
) -> report.Section:
    items: list[report.Plot | report.Video | report.Table] = []
    for x_axis, title in (("env_steps", "Over env steps"), ("hours", "Over hours")):
        figure, axes = plots.new_figure()
        plots.draw_learning_curves(axes[0, 0], group, reference, x_axis)
        items.append(report.Plot(title, plots.to_png(figure), alt=f"{title}: returns on {env}"))
    return report.Section(
        env or "unknown environment", [*items, _table(group, reference)], _CAPTION
    )


def _table(group: Sequence[curves.Curve], reference: curves.Reference | None) -> report.Table:
    """Tells where each curve ends, and where the published one is at the same env steps."""
    published = [] if reference is None else ["official there", "official end"]
    columns = ["", "return", "lowest to highest seed", *published, "env steps", "hours", "seeds"]
    rows = [_row(curve, reference) for curve in group]
    return report.Table("Where the curves end", columns, rows, wide=True)


def _row(curve: curves.Curve, reference: curves.Reference | None) -> list[str]:
    steps, hours = (curves.average(curve.trials, axis) for axis in ("env_steps", "hours"))
    seeds = len(curve.trials)
    shared = bool(steps.x.size and hours.x.size)  # else no point is covered by all seeds
    places = decimals(np.concatenate([trial.episode_return for trial in curve.trials]))

    def shown(value: float) -> str:
        return _BLANK if np.isnan(value) else f"{value:.{places}f}"

    row = [curve.label, shown(steps.mean[-1]) if shared else _BLANK]
    spread = shared and seeds > 1
    row += [f"{shown(steps.low[-1])} to {shown(steps.high[-1])}" if spread else _BLANK]
    if reference is not None:
        there = reference.mean_at(steps.x[-1]) if shared else np.nan
        row += [shown(there), shown(reference.band().mean[-1])]
    row += [f"{steps.x[-1]:,.0f}", f"{hours.x[-1]:.2f}"] if shared else [_BLANK, _BLANK]
    return [*row, str(seeds)]


def _footer(reference: str | None) -> str:
    if reference is None:
        return ""
    return (
        f"Official: {reference} of the scores published in github.com/danijar/dreamerv3. Env steps "
        "are agent steps times action repeat."
    )
