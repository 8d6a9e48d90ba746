"""Tests of rllib_dreamer.evaluation.curves and rllib_dreamer.cli.plot."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from rllib_dreamer.cli import plot as plot_command
from rllib_dreamer.cli.errors import CommandError
from rllib_dreamer.evaluation import curves, plots


def result(env_steps: float, episode_return: Any, seconds: float = 0.0) -> dict[str, Any]:
    """A result as Tune writes it to result.json."""
    return {
        "env_runners": {"episode_return_mean": episode_return},
        "dreamer": {"env_steps": env_steps},
        "num_env_steps_sampled_lifetime": env_steps / 2,
        "time_total_s": seconds,
    }


def write_trial(folder: Path, results: list[dict[str, Any]], env: str = "dmc/walker-walk") -> Path:
    """Writes a trial's folder as Tune leaves it."""
    folder.mkdir(parents=True)
    params = {"env": env, "env_config": {"action_repeat": 4}, "seed": 0}
    (folder / "params.json").write_text(json.dumps(params))
    lines = "".join(json.dumps(record) + "\n" for record in results)
    (folder / "result.json").write_text(lines)
    return folder


def straight(slope: float, last: int = 100, hours: float = 1.0) -> list[dict[str, Any]]:
    """Returns that grow linearly with env steps, 10 steps a result."""
    return [result(x, slope * x, 3600.0 * hours * x / last) for x in range(10, last + 1, 10)]


def test_trial_is_read_with_steps_hours_and_env(tmp_path: Path) -> None:
    records = [result(10, None, 36.0), result(20, float("nan"), 72.0), *straight(2.0)[2:]]
    trial = curves.read_trial(write_trial(tmp_path / "t", records))
    assert (trial.name, trial.env) == ("t", "dmc/walker-walk")
    np.testing.assert_array_equal(trial.env_steps, np.arange(30, 101, 10))  # none before a return
    np.testing.assert_allclose(trial.episode_return, 2.0 * trial.env_steps)
    np.testing.assert_allclose(trial.hours, trial.env_steps / 100)


def test_resumed_trial_keeps_the_later_attempt(tmp_path: Path) -> None:
    first, second = straight(1.0, last=80), straight(3.0)[5:]  # resumed at 50 of 80
    trial = curves.read_trial(write_trial(tmp_path / "t", first + second))
    np.testing.assert_array_equal(trial.env_steps, np.arange(10, 101, 10))
    np.testing.assert_allclose(trial.episode_return[:5], np.arange(10, 51, 10))
    np.testing.assert_allclose(trial.episode_return[5:], 3.0 * np.arange(60, 101, 10))


def test_line_cut_short_by_a_kill_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_trial(tmp_path / "t", straight(1.0, last=30))
    with (folder / "result.json").open("a") as file:
        file.write('{"env_runners": {"episode_ret')
    with caplog.at_level(logging.WARNING):
        assert curves.read_trial(folder).env_steps.size == 3
    assert "line 4: cut short" in caplog.text


def test_progress_csv_serves_where_there_is_no_json(tmp_path: Path) -> None:
    folder = write_trial(tmp_path / "t", [])
    (folder / "progress.csv").write_text(
        f"{curves.ENV_STEPS_KEY},{curves.RETURN_KEY},{curves.SECONDS_KEY}\n"
        "10,,3600\n20,5.5,7200\n30,nan,9000\n"
    )
    trial = curves.read_trial(folder)
    row = (trial.env_steps[0], trial.episode_return[0], trial.hours[0])
    assert trial.env_steps.size == 1 and row == (20.0, 5.5, 2.0)


def test_other_algorithms_get_env_steps_by_action_repeat(tmp_path: Path) -> None:
    records = straight(1.0)
    for record in records:
        del record["dreamer"]
    trial = curves.read_trial(write_trial(tmp_path / "t", records))
    np.testing.assert_array_equal(trial.env_steps, 4 * np.arange(5, 51, 5))


def test_half_written_params_leave_the_env_unknown(tmp_path: Path) -> None:
    folder = write_trial(tmp_path / "t", straight(1.0))
    (folder / "params.json").write_text('{"env": "dmc')
    assert curves.read_trial(folder).env == ""


def test_trials_are_found_from_every_level(tmp_path: Path) -> None:
    a = write_trial(tmp_path / "walker" / "a", straight(1.0))
    b = write_trial(tmp_path / "walker" / "b", straight(1.0))
    write_trial(a / "checkpoint_000000" / "not_a_trial", straight(1.0))
    assert curves.find_trials(tmp_path) == [a, b]
    assert curves.find_trials(tmp_path / "walker") == [a, b]
    assert curves.find_trials(b) == [b]
    assert curves.find_trials(b / "result.json") == [b]


def test_labels_pool_runs_and_environments_part_them(tmp_path: Path) -> None:
    a = write_trial(tmp_path / "one=1" / "a", straight(1.0))
    b = write_trial(tmp_path / "two" / "b", straight(1.0))
    c = write_trial(tmp_path / "two" / "c", straight(1.0), env="dmc/hopper-hop")
    found = curves.read_curves([f"mine={a}", f"mine={b}", f"mine={b}", f"mine={c}"])
    summary = [(curve.label, curve.env, len(curve.trials)) for curve in found]
    assert summary == [("mine", "dmc/walker-walk", 2), ("mine", "dmc/hopper-hop", 1)]
    labels = [curve.label for curve in curves.read_curves([str(a.parent), str(b.parent)])]
    assert labels == ["one=1", "two", "two"]


def test_only_a_label_puts_runs_of_the_same_name_together(tmp_path: Path) -> None:
    a = write_trial(tmp_path / "fast" / "seed_0", straight(1.0))
    b = write_trial(tmp_path / "slow" / "seed_0", straight(1.0))
    found = curves.read_curves([str(a), str(b), f"{a}/"])
    assert [(curve.label, len(curve.trials)) for curve in found] == [(str(a), 1), (str(b), 1)]
    (found,) = curves.read_curves([f"seed_0={a}", f"seed_0={b}"])
    assert len(found.trials) == 2


def test_settings_part_the_trials_of_a_search(tmp_path: Path) -> None:
    for number, (lr, seed) in enumerate([(1e-4, 0), (1e-4, 1), (1e-2, 0)]):
        folder = write_trial(tmp_path / "run" / str(number), straight(1.0))
        params = {"env": "dmc/walker-walk", "seed": seed, "f": f"<function f at 0x7f{number}>"}
        (folder / "params.json").write_text(json.dumps({**params, "lr": lr, "d": {"a": 1}}))
    found = curves.read_curves([f"mine={tmp_path / 'run'}"])
    summary = [(curve.label, len(curve.trials)) for curve in found]
    assert summary == [("mine lr=0.0001", 2), ("mine lr=0.01", 1)]


def test_average_covers_what_all_seeds_cover() -> None:
    def trial(first: int, last: int, slope: float) -> curves.Trial:
        x = np.arange(first, last + 1, 10, dtype=float)
        return curves.Trial("t", "env", x, x / 10, slope * x)

    line = curves.average([trial(10, 100, 1.0), trial(30, 80, 3.0)], points=11)
    np.testing.assert_allclose(line.x, np.linspace(30, 80, 11))
    np.testing.assert_allclose(line.mean, 2.0 * line.x)
    np.testing.assert_allclose(line.low, line.x)
    np.testing.assert_allclose(line.high, 3.0 * line.x)
    single = curves.average([trial(10, 100, 1.0)], axis="hours")
    np.testing.assert_allclose(single.low, single.high)
    assert single.x[-1] == 10.0
    assert curves.average([trial(10, 20, 1.0), trial(30, 40, 1.0)]).x.size == 0


@pytest.mark.parametrize("name", curves.REFERENCES)
def test_references_are_complete(name: str) -> None:
    for task, reference in curves.load_reference(name).items():
        assert reference.task == task
        assert (np.diff(reference.env_steps) > 0).all()
        assert reference.episode_return.shape == (
            10 if name == "dmc_vision" else 5,
            reference.env_steps.size,
        )
        line = reference.band()
        assert np.isfinite(line).all() and (line.low <= line.high).all()


def test_reference_values_and_gaps() -> None:
    walker = curves.load_reference("dmc_vision")["dmc_walker_walk"]
    assert walker.env_steps[[0, -1]].tolist() == [10_000, 1_000_000]
    assert walker.episode_return[0, :2].tolist() == [60.51, 119.60]
    assert 930 < walker.episode_return[:, -10:].mean() < 980
    pong = curves.load_reference("atari100k")["atari_pong"]
    assert np.isnan(pong.episode_return).sum() == 5 * pong.env_steps.size - 183
    # Seed 0 has no score in the last cell, and counts there with its last one.
    assert np.isnan(pong.episode_return[:, -1]).tolist() == [True, False, False, False, False]
    scored = pong.episode_return[0, ~np.isnan(pong.episode_return[0])]
    last = np.append(pong.episode_return[1:, -1], scored[-1])
    assert pong.band().mean[-1] == pytest.approx(last.mean()) == pytest.approx(-5.0)


def test_gaps_of_a_seed_are_interpolated() -> None:
    table = np.array([[np.nan, 2.0, np.nan, 4.0, np.nan], [0.0] * 5])
    line = curves.Reference("t", np.arange(5) * 10.0, table).band()
    assert line.mean.tolist() == [0.0, 1.0, 1.5, 2.0, 2.0]
    assert line.high.tolist() == [0.0, 2.0, 3.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("env", "task"),
    [
        ("dmc/walker-walk", "dmc_walker_walk"),
        ("DMC/ball_in_cup/catch", "dmc_ball_in_cup_catch"),
        ("dmc/cup-catch", "dmc_ball_in_cup_catch"),
        ("DMC/cup/catch", "dmc_ball_in_cup_catch"),
        ("atari100k/ms_pacman", "atari_ms_pacman"),
        ("ALE/MsPacman-v5", "atari_ms_pacman"),
        ("ALE/Pong-v5", "atari_pong"),
        ("CartPole-v1", "cartpole_v1"),
    ],
)
def test_reference_task(env: str, task: str) -> None:
    assert curves.reference_task(env) == task


def test_drawn_lines_hold_the_data(tmp_path: Path) -> None:
    write_trial(tmp_path / "run" / "a", straight(1.0, last=50_000))
    write_trial(tmp_path / "run" / "b", straight(3.0, last=50_000))
    group = curves.read_curves([str(tmp_path / "run")])
    reference = curves.load_reference("dmc_vision")["dmc_walker_walk"]
    _, axes = plots.new_figure(1, 2)
    plots.draw_learning_curves(axes[0, 0], group, reference, "env_steps")
    lines = {line.get_label(): line for line in axes[0, 0].lines}
    np.testing.assert_allclose(lines["run (2 seeds)"].get_ydata()[-1], 100_000)
    official = lines["official (10 seeds)"]
    assert official.get_xdata()[-1] == axes[0, 0].get_xlim()[1]  # what lies beyond scales nothing
    shown = len(official.get_xdata()) - 1
    np.testing.assert_allclose(official.get_ydata()[:-1], reference.episode_return.mean(0)[:shown])
    assert official.get_ydata()[-1] == pytest.approx(reference.mean_at(official.get_xdata()[-1]))
    plots.draw_learning_curves(axes[0, 1], group, reference, "hours")
    assert axes[0, 1].lines[0].get_label() == "official at 1M env steps"
    assert axes[0, 1].get_xlim() == pytest.approx((0, 1.03))
    with pytest.raises(ValueError, match="x_axis: got 'days'"):
        plots.draw_learning_curves(axes[0, 0], group, None, "days")


def test_many_curves_can_be_told_apart() -> None:
    points = np.array([1.0, 2.0])
    trial = curves.Trial("t", "e", points, points, points)
    many = [curves.Curve(str(number), "e", [trial]) for number in range(14)]
    _, axes = plots.new_figure()
    plots.draw_learning_curves(axes[0, 0], many, None, "hours")
    means = [line for line in axes[0, 0].lines if line.get_linewidth() == 2]
    assert len({(line.get_color(), line.get_linestyle()) for line in means}) == len(means) == 14


def command() -> typer.Typer:
    """An app with the sub-command alone."""
    app = typer.Typer()
    app.command()(plot_command.plot)
    return app


def test_command_writes_picture_and_page(tmp_path: Path) -> None:
    for seed in range(2):
        write_trial(tmp_path / "run" / str(seed), straight(1e-3 * (1 + seed), last=20_000))
    write_trial(tmp_path / "run" / "hop", straight(1e-3, last=20_000), env="dmc/hopper-hop")
    write_trial(tmp_path / "run" / "mine", straight(1e-3, last=20_000), env="my/env")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "run"), "--reference", "dmc_vision", "--save-dir", str(out)]
    outcome = CliRunner().invoke(command(), arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "report.html" in outcome.stdout and "learning_curves.png" in outcome.stdout
    picture = matplotlib.image.imread(out / "learning_curves.png")
    assert picture.shape[:2] == (3 * 544, 2 * 800)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 6
    walker = curves.load_reference("dmc_vision")["dmc_walker_walk"].episode_return
    for cell in ("30.0", "20.0 to 40.0", f"{walker[:, 1].mean():.1f}", "20,000", "1.00"):
        assert f"<td>{cell}</td>" in page
    assert "my/env" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run: got 'nowhere', which does not exist"),
        (["run", "--reference", "dmc"], "reference: got 'dmc'; must be one of atari100k"),
        (["run", "--task", "dmc_walker_walk"], "without a reference; add --reference NAME"),
        (["run", "--reference", "atari100k"], "has no curve for dmc_walker_walk; it has atari_"),
    ],
)
def test_usage_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_trial(tmp_path / "run" / "a", straight(1.0))
    outcome = CliRunner().invoke(command(), arguments)
    assert isinstance(outcome.exception, CommandError)
    assert message in str(outcome.exception) and "\n" not in str(outcome.exception)
    assert not (tmp_path / "plots").exists()


def test_task_of_the_reference_can_be_chosen() -> None:
    found = plot_command.find_references(["my/env"], "dmc_vision", "dmc_walker_walk")
    assert found["my/env"].task == "dmc_walker_walk"


def test_seeds_without_a_common_stretch_are_drawn_and_marked(tmp_path: Path) -> None:
    write_trial(tmp_path / "run" / "a", straight(1.0, last=20))
    write_trial(tmp_path / "run" / "b", straight(1.0)[5:])
    plot_command.write_learning_curves([str(tmp_path / "run")], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<td>-</td>") == 4


def test_published_value_is_left_blank_where_none_is_published(tmp_path: Path) -> None:
    write_trial(tmp_path / "early" / "a", straight(1e-3, last=2_000))
    write_trial(tmp_path / "late" / "a", [result(10, 1.0), result(2_000_000, 2.0)])
    for run in ("early", "late"):
        arguments = ([str(tmp_path / run)], tmp_path / f"{run}_out")
        plot_command.write_learning_curves(*arguments, reference="dmc_vision")
        page = (tmp_path / f"{run}_out" / "report.html").read_text(encoding="utf-8")
        assert page.count("<td>-</td>") == 2  # the range of a single seed, and the published


def test_errors_name_the_field(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"which holds no result.json or progress.csv"):
        curves.find_trials(tmp_path)
    folder = write_trial(tmp_path / "t", [result(10, None)])
    with pytest.raises(ValueError, match="in which no episode has ended yet"):
        curves.read_curves([str(folder)])
    with pytest.raises(ValueError, match="reference: got 'dmc'; must be one of atari100k"):
        curves.load_reference("dmc")
