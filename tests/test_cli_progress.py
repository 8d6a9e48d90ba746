"""Stop conditions, the screen of a run, and messages of the `rllib` command."""

from __future__ import annotations

import io
import math
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from rllib_dreamer.cli.errors import first_line
from rllib_dreamer.cli.progress import ABSENT, ProgressDisplay, TrialView, as_line, as_table
from rllib_dreamer.cli.reporter import SCORE, RunReporter
from rllib_dreamer.cli.stopping import StopCondition


def test_stop_condition_uses_short_names_and_waits_for_missing_metrics() -> None:
    condition = StopCondition({"env_steps": 10, "env_runners/episode_return_mean": 5})
    assert not condition("t", {"dreamer": {"env_steps": 9}})
    assert not condition("t", {"env_runners": {"episode_return_mean": math.nan}})
    assert condition("t", {"dreamer": {"env_steps": 10}})
    assert condition("t", {"num_env_steps_sampled_lifetime": 10})
    assert condition("t", {"env_runners": {"episode_return_mean": 5.0}})
    for value in (np.float32(5), np.int64(5)):  # as RLlib passes on what a callback logs
        assert condition("t", {"env_runners": {"episode_return_mean": value}})


def test_a_requested_stop_ends_trials_at_their_next_result_only() -> None:
    condition = StopCondition({})
    assert not condition("t", {})
    condition.request()
    assert condition("t", {})
    assert not condition.stop_all()


def result(step: int, **more: Any) -> dict[str, Any]:
    return {
        "training_iteration": step,
        "dreamer": {"env_steps": 20 * step, "agent_steps": 10 * step, "updates": 5 * step},
        "env_runners": {"episode_return_mean": math.nan},
        "learners": {"default_policy": {"loss_image": 2.5, "loss_dyn": 1.0}},
        **more,
    }


def test_progress_shows_no_nan_before_the_first_episode_ends() -> None:
    view = TrialView({"env_steps": 100})
    view.add(0.0, result(1))
    cells = dict(view.cells())
    assert cells["return"] == cells["length"] == ABSENT
    assert "nan" not in as_line(view.cells())


def test_progress_figures() -> None:
    view = TrialView({"env_steps": 100})
    for step in (1, 2, 3):
        view.add(2.0 * step, result(step))
    view.add(8.0, result(4, env_runners={"episode_return_mean": 12.5, "episode_len_mean": 7.0}))
    view.add(10.0, result(4))
    view.add(10.0, result(4))
    cells = dict(view.cells())
    assert cells["env steps"] == "80"
    assert cells["return"] == "12.5"
    assert cells["image"] == "2.5"
    # 60 env steps in 8 s, 20 to go.
    assert view.seconds_left() == pytest.approx(20 / (60 / 8))
    assert cells["left"] == "0m03s"
    assert "success" not in cells


def test_progress_shows_the_success_of_environments_that_tell() -> None:
    view = TrialView({"env_steps": 100})
    for step, share in enumerate((math.nan, 0.255, math.nan)):
        view.add(2.0 * step, result(step, env_runners={"episode_success_mean": share}))
    assert dict(view.cells())["success"] == "26 %"


def test_a_limit_that_no_result_has_is_pointed_out_once() -> None:
    console = Console(file=io.StringIO(), width=200)
    limits = {"timesteps_total": 9, "env_steps": 5, "updates": 1, "evaluation/x": 1}
    display = ProgressDisplay(console, limits | {"env_runners/episode_return_mean": 9})
    trial: Any = SimpleNamespace(trial_id="t")
    for step in (1, 2):
        found = {**result(step), "time_total_s": 1.0}
        display.on_trial_result(step, [trial], trial, found)
    told = [line for line in console.file.getvalue().splitlines() if "stop:" in line]
    assert len(told) == 1 and "no metric 'timesteps_total'" in told[0]
    assert "did you mean" in told[0] and "time_total_s" in told[0]


def test_progress_of_other_algorithms() -> None:
    view = TrialView({})
    learners = {"default_policy": {"total_loss": 1.5}}
    for second, steps in ((1.0, 100), (3.0, 300)):
        view.add(second, {"num_env_steps_sampled_lifetime": steps, "learners": learners})
    cells = dict(view.cells())
    assert (cells["env steps"], cells["steps/s"], cells["left"]) == ("300", "100", ABSENT)
    assert cells["total_loss"] == "1.5"
    table = as_table({"a": view, "b": view}, Console(width=200))
    assert isinstance(table, Table) and table.row_count == 2


@pytest.mark.parametrize("width", [72, 80, 120])
def test_a_terminal_shows_every_figure_whole(width: int) -> None:
    losses = {f"loss_{name}": 123.4 for name in ("image", "reward", "dyn", "actor", "critic")}
    more = {"learners": {"default_policy": losses}, "env_runners": {"episode_return_mean": 98.76}}
    screen = Console(file=io.StringIO(), width=width, force_terminal=True)
    display = ProgressDisplay(screen, {"env_steps": 1_000_000})
    for step in (1, 2):
        display.on_trial_result(step, [trial_of("a")], trial_of("a"), result(1000 * step, **more))
    display.close()
    shown = screen.file.getvalue()
    assert "…" not in shown
    for name, text in display.views["a"].cells():
        assert name in shown and text in shown


def trial_of(name: str) -> Any:
    return SimpleNamespace(trial_id=name)


def test_a_limit_without_end_has_no_time_left() -> None:
    view = TrialView({"env_steps": math.inf})
    for step in (1, 2):
        view.add(1.0 * step, result(step))
    assert dict(view.cells())["left"] == ABSENT


def test_score_is_the_last_known_return() -> None:
    reporter = RunReporter()
    scores = []
    for value in (math.nan, 3.0, math.nan):
        given: dict[str, Any] = {"env_runners": {"episode_return_mean": value}}
        reporter.on_train_result(algorithm=None, result=given)  # type: ignore[arg-type]
        scores.append(given[SCORE])
    assert math.isnan(scores[0]) and scores[1:] == [3.0, 3.0]


def failed_with(raise_it: Callable[[], None]) -> RuntimeError:
    """An error as Ray hands it over: its text is the traceback of another process."""
    try:
        raise_it()
    except Exception as error:
        text = "".join(traceback.format_exception(error))
    return RuntimeError(f"ray::DreamerTorch.train()\n{text}")


class TestFirstLine:
    def test_without_a_traceback(self) -> None:
        assert first_line(ValueError("one\ntwo")) == "ValueError: one"
        assert first_line(ValueError()) == "ValueError: no message"

    def test_what_was_raised_while_handling_hides_its_cause(self) -> None:
        def fail() -> None:
            try:
                raise ValueError("unknown size")
            finally:
                raise TypeError("in the clean-up")

        assert first_line(failed_with(fail)) == "ValueError: unknown size"

    def test_what_was_raised_from_another_explains_it(self) -> None:
        def explain() -> None:
            try:
                {}["gripper"]
            except KeyError as error:
                raise RuntimeError("Env 'Arm' raised in step()") from error

        def fail() -> None:
            try:
                explain()
            finally:
                raise TypeError("in the clean-up")

        def say_nothing() -> None:
            try:
                raise OSError("no")
            except OSError as error:
                raise RuntimeError from error

        assert first_line(failed_with(say_nothing)) == "OSError: no"
        assert first_line(failed_with(explain)) == "RuntimeError: Env 'Arm' raised in step()"
        assert first_line(failed_with(fail)) == "RuntimeError: Env 'Arm' raised in step()"
