"""Figures of an evaluation, drawn by matplotlib without a display.

Every function returns a `Figure`; `to_png` makes bytes of it. Sizes and fonts are chosen so that
the text stays readable when a phone shrinks the picture to the width of its screen.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from rllib_dreamer.evaluation.curves import Curve, Reference, average
from rllib_dreamer.evaluation.reconstruction import OpenLoopQuality, StepQuality
from rllib_dreamer.evaluation.statistics import Summary

BLUE, ORANGE, GRAY = "#1f6feb", "#bc4c00", "#6e7781"
COLORS = (BLUE, "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#0e7490")
LINE_STYLES = ("-", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
GREEN, RED = "#2ea043", "#da3633"
PLOT_SIZE = (5.0, 3.4)
"""Width and height of a single plot, in inches."""

_STYLE: Any = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": GRAY,
}


def new_figure(rows: int = 1, columns: int = 1) -> tuple[Figure, NDArray[Any]]:
    """Makes a figure with a grid of axes in the style of the package.

    Args:
        rows: number of rows of axes.
        columns: number of columns of axes.

    Returns:
        The figure and its axes (rows, columns).
    """
    with matplotlib.rc_context(_STYLE):
        size = (PLOT_SIZE[0] * columns, PLOT_SIZE[1] * rows)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, squeeze=False)


def to_png(figure: Figure, dpi: int = 160) -> bytes:
    """Renders a figure.

    Args:
        figure: what to render.
        dpi: pixels per inch.

    Returns:
        The content of a PNG file.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plot_returns(returns: ArrayLike, summary: Summary) -> Figure:
    """Draws the return of each episode, sorted, with the IQM and its interval.

    Args:
        returns: (N,) returns.
        summary: their summary.

    Returns:
        The figure.
    """
    ordered = np.sort(np.asarray(returns, np.float64))
    figure, axes = new_figure()
    axis: Axes = axes[0, 0]
    axis.axhspan(summary.iqm_low, summary.iqm_high, color=ORANGE, alpha=0.15, lw=0)
    axis.axhline(
        summary.iqm, color=ORANGE, label=f"IQM {summary.iqm:.{summary.decimals}f} with interval"
    )
    axis.plot(np.arange(1, ordered.size + 1), ordered, "o", color=BLUE, label="one episode")
    axis.set(xlabel="episode, sorted by return", ylabel="return")
    axis.set_xlim(0.5, ordered.size + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="best")
    return figure


def plot_reward_traces(rewards: dict[str, NDArray[Any]]) -> Figure:
    """Draws the reward along episodes.

    Args:
        rewards: name of an episode -> (T,) its rewards per agent step.

    Returns:
        The figure.
    """
    figure, axes = new_figure()
    axis: Axes = axes[0, 0]
    for color, (name, values) in zip(COLORS * len(rewards), rewards.items(), strict=False):
        axis.plot(np.arange(1, len(values) + 1), values, color=color, lw=1.2, label=name)
    axis.set(xlabel="agent step", ylabel="reward")
    axis.legend(loc="best")
    return figure


def plot_open_loop(
    quality: OpenLoopQuality, metric: str = "ssim", baseline: OpenLoopQuality | None = None
) -> Figure:
    """Draws the quality of predicted frames over the step in the sequence.

    Args:
        quality: quality of the model's frames.
        metric: "ssim" or "psnr".
        baseline: quality of a still picture (`reconstruction.repeat_last_context`).

    Returns:
        The figure; observed steps are green, imagined ones red, as in the videos.

    Raises:
        ValueError: if the metric is unknown.
    """
    names = {"ssim": "SSIM", "psnr": "PSNR (dB)"}
    if metric not in names:
        raise ValueError(f"metric: got {metric!r}; must be one of {sorted(names)}.")
    figure, axes = new_figure()
    axis: Axes = axes[0, 0]
    context = int(quality.context.step[-1])
    _draw_steps(axis, quality.context, metric, -context, GREEN, "observed")
    _draw_steps(axis, quality.ahead, metric, 0, RED, "imagined")
    if baseline is not None:
        still = getattr(baseline.ahead, metric)
        axis.plot(baseline.ahead.step, still, "--", color=GRAY, label="last frame held")
    axis.axvline(0.5, color=GRAY, lw=1, ls=":")
    axis.set(xlabel="steps ahead of the last observed frame", ylabel=names[metric])
    axis.legend(loc="best")
    return figure


def draw_learning_curves(
    axis: Axes, curves: Sequence[Curve], reference: Reference | None, x_axis: str
) -> None:
    """Draws learning curves of one environment into given axes.

    Each curve is a mean over the stretch that all its seeds cover, on a band from the lowest to
    the highest seed; the seeds themselves are thin lines. Against hours, of which none are
    published, the reference is the level that it ends on.

    Args:
        axis: where to draw.
        curves: at least one curve.
        reference: the published curve of the same task, if there is one.
        x_axis: "env_steps" or "hours".

    Raises:
        ValueError: if `x_axis` is unknown.
    """
    labels = {"env_steps": "env steps", "hours": "hours of training"}
    if x_axis not in labels:
        raise ValueError(f"x_axis: got {x_axis!r}; must be one of {sorted(labels)}.")
    limit = 1.03 * max(getattr(trial, x_axis)[-1] for curve in curves for trial in curve.trials)
    if reference is not None:
        _draw_reference(axis, reference, x_axis, limit)
    for (dashes, color), curve in zip(cycle(product(LINE_STYLES, COLORS)), curves, strict=False):
        for trial in curve.trials:
            x = getattr(trial, x_axis)
            marker = "o" if x.size == 1 else None  # a line through one point is invisible
            axis.plot(x, trial.episode_return, color=color, lw=0.8, alpha=0.45, marker=marker)
        line = average(curve.trials, x_axis)
        seeds = len(curve.trials)
        label = f"{curve.label} ({seeds} seed{'s' if seeds > 1 else ''})"
        axis.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, lw=0)
        axis.plot(line.x, line.mean, color=color, lw=2, ls=dashes, label=label)
    axis.set(xlabel=labels[x_axis], ylabel="episode return", xlim=(0, limit or 1.0))
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if x_axis == "env_steps":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.legend(loc="best")


def _draw_reference(axis: Axes, reference: Reference, x_axis: str, limit: float) -> None:
    """Draws a published curve as far as the axis goes: what lies beyond would scale the other."""
    line = reference.band()
    seeds = len(reference.episode_return)
    if x_axis == "hours":
        label = f"official at {EngFormatter(sep='')(line.x[-1])} env steps"
        axis.axhline(line.mean[-1], color=GRAY, ls="--", label=label)
        return
    x = np.append(line.x[line.x < limit], min(limit, line.x[-1]))
    center, low, high = (np.interp(x, line.x, values) for values in line[1:])
    axis.fill_between(x, low, high, color=GRAY, alpha=0.18, lw=0)
    axis.plot(x, center, color=GRAY, ls="--", label=f"official ({seeds} seeds)")


def _draw_steps(
    axis: Axes, quality: StepQuality, metric: str, shift: int, color: str, label: str
) -> None:
    low, high = (getattr(quality, f"{metric}_{side}") for side in ("low", "high"))
    x = quality.step + shift
    axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    marker = "o" if x.size == 1 else None
    axis.plot(x, getattr(quality, metric), color=color, lw=2, marker=marker, label=label)
