"""What the screen shows while a run goes on."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.utils import flatten_dict
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from rllib_dreamer.cli.errors import first_line
from rllib_dreamer.cli.stopping import STOP_ALIASES, lookup, unknown_metrics
from rllib_dreamer.near_names import did_you_mean

#: Shown for a number that is not there yet.
ABSENT = "\N{EN DASH}"
#: Seconds between two lines when the output is no terminal.
LINE_PERIOD = 10.0
#: How long (s) an algorithm may take to describe itself.
DESCRIBE_TIMEOUT = 60.0

_LOSSES = ("image", "vector", "reward", "dyn", "actor", "critic")
_OTHER_LOSSES = ("total_loss", "policy_loss", "vf_loss", "qf_loss", "loss_total")
_RETURN = "env_runners/episode_return_mean"
_LENGTH = "env_runners/episode_len_mean"
_SUCCESS = "env_runners/episode_success_mean"
_LEARNER = "learners/default_policy/"
#: Limits whose metric grows with time, so that the time left can be told.
_COUNTERS = (
    "env_steps",
    "agent_steps",
    "updates",
    "iterations",
    "seconds",
    "dreamer/env_steps",
    "dreamer/agent_steps",
    "dreamer/updates",
    "training_iteration",
    "time_total_s",
    "num_env_steps_sampled_lifetime",
    "num_agent_steps_sampled_lifetime",
)


class Cell(NamedTuple):
    """One column: heading and text."""

    heading: str
    text: str


class Moment(NamedTuple):
    """A result with the time (s) at which it came."""

    seconds: float
    result: Mapping[str, Any]


@dataclass
class TrialView:
    """The first and the newest results of one trial.

    Attributes:
        limits: The stop condition, for the time left.
        moments: The first result of this session, then the newest two.
        episodes: The newest known mean return, length and success; no episode may end in a result.
    """

    limits: Mapping[str, float]
    moments: list[Moment] = field(default_factory=list)
    episodes: dict[str, float] = field(default_factory=dict)

    def add(self, seconds: float, result: Mapping[str, Any]) -> None:
        """Takes a result that came at `seconds`."""
        moment = Moment(seconds, flatten_dict(dict(result)))
        self.moments = [*self.moments[:1], *self.moments[-1:], moment][-3:]
        for name in (_RETURN, _LENGTH, _SUCCESS):
            value = lookup(moment.result, name)
            if value is not None:
                self.episodes[name] = value

    @property
    def newest(self) -> Mapping[str, Any]:
        """The newest result, flat."""
        return self.moments[-1].result

    def rate(self, name: str, first: int = -2) -> float | None:
        """Growth of a metric per second since an earlier result.

        Args:
            name: The metric.
            first: Which result to measure from: -2 the one before, 0 the first.
        """
        if len(self.moments) < 2:
            now = lookup(self.newest, name)
            seconds = lookup(self.newest, "time_this_iter_s")
            started = lookup(self.newest, "training_iteration") == 1
            return now / seconds if now is not None and seconds and started else None
        old, new = self.moments[first], self.moments[-1]
        before, now = lookup(old.result, name), lookup(new.result, name)
        seconds = new.seconds - old.seconds
        if before is None or now is None or seconds <= 0:
            return None
        return (now - before) / seconds

    def seconds_left(self) -> float | None:
        """Time until the first limit is reached at the mean speed so far, None if unknown."""
        estimates = []
        for name, limit in self.limits.items():
            rate, now = self.rate(name, first=0), lookup(self.newest, name)
            if name in _COUNTERS and rate and now is not None:
                estimates.append(max(0.0, (limit - now) / rate))
        return min(estimates, default=None)

    def cells(self) -> list[Cell]:
        """The columns to show, in order."""
        new = self.newest

        def rate(key: str, counter: str) -> float | None:
            value = lookup(new, key)
            return value if value is not None else self.rate(counter)

        cells = [
            Cell("env steps", _count(lookup(new, "env_steps"))),
            Cell("steps/s", _number(rate("dreamer/agent_steps_per_s", "agent_steps"))),
            Cell("updates/s", _number(rate("dreamer/updates_per_s", "updates"))),
            Cell("return", _number(self.episodes.get(_RETURN))),
            Cell("length", _number(self.episodes.get(_LENGTH))),
        ]
        if _SUCCESS in self.episodes:
            cells.append(Cell("success", f"{100 * self.episodes[_SUCCESS]:.0f} %"))
        cells.append(Cell("ratio", _number(lookup(new, "dreamer/actual_training_ratio"))))
        cells += [Cell(name, _loss(value)) for name, value in _losses(new).items()]
        return [*cells, Cell("left", _duration(self.seconds_left()))]


class ProgressDisplay(Callback):
    """Tune callback that draws a live table on a terminal, else prints lines.

    Args:
        console: Where to write; what Tune pickles of this callback leaves it out.
        limits: The stop condition.
    """

    def __init__(self, console: Console, limits: Mapping[str, float]) -> None:
        self.console = console
        self.limits = dict(limits)
        self.views: dict[str, TrialView] = {}
        self.last_line = -math.inf
        self.live: Live | None = None
        self.described: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles callbacks into the experiment folder; the screen stays out of it."""
        return {"limits": self.limits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Comes back with a screen of its own."""
        self.__init__(Console(), state["limits"])  # type: ignore[misc]

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Shows what an algorithm says about itself, before it trains."""
        actor = trial.temporary_state.ray_actor
        if trial.trial_id in self.described or not hasattr(trial.get_trainable_cls(), "describe"):
            return
        self.described.add(trial.trial_id)
        try:
            self._print(ray.get(actor.describe.remote(), timeout=DESCRIBE_TIMEOUT))
        except RayError as error:
            self._print(f"(the algorithm cannot describe itself: {first_line(error)})")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Takes a result and shows it."""
        first = not self.views
        view = self.views.setdefault(trial.trial_id, TrialView(self.limits))
        now = time.monotonic()
        view.add(now, result)
        if first:
            self._warn_of_limits(view.newest)
        if self.console.is_terminal:
            self._draw()
        elif now - self.last_line >= LINE_PERIOD or result.get("done"):
            self.last_line = now
            name = f"{trial.trial_id}  " if len(trials) > 1 else ""
            self._print(name + as_line(view.cells()))

    def close(self) -> None:
        """Leaves the last state of the table on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _warn_of_limits(self, result: Mapping[str, Any]) -> None:
        """Says which limits will not stop the run unless later results have their metrics."""
        for name in unknown_metrics(result, self.limits):
            near = did_you_mean(name, [*STOP_ALIASES, *result])
            self._print(f"stop: the results have no metric {name!r} to stop by{near}")

    def _draw(self) -> None:
        if self.live is None:
            self.live = Live(console=self.console, auto_refresh=False, transient=False)
            self.live.start()
        self.live.update(as_table(self.views, self.console), refresh=True)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def as_line(cells: list[Cell]) -> str:
    """Puts the columns into one plain line."""
    return "  ".join(f"{cell.heading} {cell.text}" for cell in cells)


def as_table(views: Mapping[str, TrialView], console: Console) -> Table | Group:
    """Puts the trials into a table, one row each; losses go below where the screen is narrow."""
    rows = {name: dict(view.cells()) for name, view in views.items()}
    headings = list(dict.fromkeys(heading for texts in rows.values() for heading in texts))
    headings.sort(key=lambda heading: heading == "left")
    table = _table(rows, headings)
    unlimited = console.options.update(max_width=sys.maxsize)
    if console.measure(table, options=unlimited).maximum <= console.width:
        return table
    losses = [heading for heading in headings if heading in (*_LOSSES, *_OTHER_LOSSES)]
    others = [heading for heading in headings if heading not in losses]
    return Group(*(_table(rows, part) for part in (others, losses) if part))


def _table(rows: Mapping[str, Mapping[str, str]], headings: list[str]) -> Table:
    """Puts texts by trial and heading into a table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    several = len(rows) > 1
    if several:
        table.add_column("trial")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, texts in rows.items():
        values = [texts.get(heading, ABSENT) for heading in headings]
        table.add_row(*([name[-5:]] if several else []), *values)
    return table


def _losses(result: Mapping[str, Any]) -> dict[str, float]:
    """Picks at most five losses: Dreamer's own, else those of other algorithms."""
    losses = _numbers(result, {name: f"{_LEARNER}loss_{name}" for name in _LOSSES})
    others = _numbers(result, {name: _LEARNER + name for name in _OTHER_LOSSES})
    return dict(list((losses or others).items())[:5])


def _numbers(result: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, float]:
    """Takes those of the keys that a result has, by the name to show."""
    return {name: float(result[key]) for name, key in keys.items() if key in result}


def _number(value: float | None) -> str:
    """Three significant digits, no exponent; a dash if absent."""
    if value is None or math.isnan(value):
        return ABSENT
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _loss(value: float) -> str:
    """A loss; unlike a missing return, a NaN here is real and is shown."""
    return f"{value:.3g}"


def _count(value: float | None) -> str:
    return ABSENT if value is None else f"{int(value):,}"


def _duration(seconds: float | None) -> str:
    """Hours, minutes and seconds; a dash if unknown or without end."""
    if seconds is None or math.isinf(seconds):
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
