"""`make reproduce`: a tiny experiment from nothing to its table rows, and what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # the scripts import one another as programs do

import experiments  # noqa: E402
import reproduce  # noqa: E402
import reproduce_results  # noqa: E402
import reproduce_runs  # noqa: E402
import typer  # noqa: E402
from experiments import EXPERIMENTS, Experiment  # noqa: E402

from rllib_dreamer.cli.experiment import experiment_from_file  # noqa: E402
from rllib_dreamer.cli.options import TrainOptions  # noqa: E402
from rllib_dreamer.evaluation.curves import Trial  # noqa: E402

EXAMPLE = """
import sys
sys.path.insert(0, {tests!r})
from tiny import MODEL
from rllib_dreamer import DreamerConfig

config = DreamerConfig().environment("CartPole-v1")
config.training(model_size="1M", batch_size_B=2, batch_length_T=4, horizon_H=2, training_ratio=1)
config.training(replay_capacity=1000, precision="float32", compile=False, learner_threads=1)
config.rl_module(model_config=MODEL)
config.reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=50)
"""

PAGE = f"before\n\n{reproduce_results.BEGIN}\n{reproduce_results.END}\n\nafter\n"


class Places(NamedTuple):
    """Where an experiment writes."""

    runs: Path
    results: Path
    page: Path


@pytest.fixture
def places(tmp_path: Path) -> Places:
    page = tmp_path / "results.md"
    page.write_text(PAGE)
    return Places(tmp_path / "runs", tmp_path / "results", page)


@pytest.fixture
def tiny_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    file = tmp_path / "tiny_cartpole.py"
    file.write_text(EXAMPLE.format(tests=str(ROOT / "tests")))
    stops = ({"agent_steps": 100}, {"agent_steps": 200})
    found = Experiment(str(file), "tiny", (3,), stops, settings=("entropy_scale=0.001",))
    monkeypatch.setitem(EXPERIMENTS, "tiny", found)
    monkeypatch.setattr(reproduce, "EPISODES", 2)
    monkeypatch.setattr(reproduce_runs, "EPISODES", 2)
    return found


def call(places: Places, *words: str) -> Result:
    app = typer.Typer()
    app.command()(reproduce.main)
    where = [f"--{key}={path}" for key, path in places._asdict().items()]
    return CliRunner().invoke(app, [*words, *where])


@pytest.mark.slow
def test_from_nothing_to_the_table(
    tiny_experiment: Experiment, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = call(places, "tiny")
    assert done.exit_code == 0, done.output
    folder = places.results / "tiny"
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    curve = np.loadtxt(folder / "seed_3.csv", delimiter=",", skiprows=1, ndmin=2)  # (P, 3)
    assert np.all(np.diff(curve[:, 0]) > 0) and curve[-1, 0] >= 200
    summary = json.loads((folder / "summary.json").read_text())
    assert [stop["stop"] for stop in summary["stops"]] == list(tiny_experiment.stops)
    first, second = (stop["seeds"][0] for stop in summary["stops"])
    assert 100 <= first["env_steps"] < second["env_steps"] == curve[-1, 0]
    assert (len(first["stretches"]), len(second["stretches"])) == (1, 2)  # the second is resumed
    assert 0 < first["cpu_hours"] < second["cpu_hours"]
    assert len(first["episode_returns"]) == 2
    table = [line for line in places.page.read_text().splitlines() if "[tiny]" in line]
    assert len(table) == 2 and "200 agent_steps" in table[1] and "(2 stretches)" in table[1]

    monkeypatch.setattr(reproduce_runs, "RLLIB", ["false"])  # nothing may be run again
    before = places.page.read_text()
    assert call(places, "tiny").exit_code == 0
    assert places.page.read_text() == before


def fake_rllib(code: int) -> list[str]:
    """A command in place of `rllib` that leaves an experiment's state and ends with a code."""
    script = (
        "import pathlib, sys; words = sys.argv[1:]; value = lambda k: words[words.index(k) + 1];"
        "folder = pathlib.Path(value('--storage-path')) / value('--name');"
        "assert folder.is_dir() == ('--resume' in words), words;"
        "folder.mkdir(exist_ok=True); (folder / 'experiment_state-1.json').touch();"
        f"sys.exit({code})"
    )
    return [sys.executable, "-c", script]


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [(1, 1, "training ended with exit code 1"), (130, 130, "goes on from the last checkpoint")],
)
def test_an_interrupted_run_is_on_record_and_resumed(
    tiny_experiment: Experiment,
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    exit_code: int,
    message: str,
) -> None:
    for count in (1, 2):
        monkeypatch.setattr(reproduce_runs, "RLLIB", fake_rllib(code))
        done = call(places, "tiny")
        assert done.exit_code == exit_code and message in done.output
        run = reproduce_runs.SeedRun(tiny_experiment, 3, places.runs / "tiny")
        assert [stretch.reached for stretch in run.stretches()] == [False] * count
    assert run.stretches(0) == []
    monkeypatch.setattr(reproduce_runs, "RLLIB", fake_rllib(0))
    run.train(0)
    assert len(run.stretches(0)) == 3


def test_sigterm_is_passed_on_to_the_training(
    tiny_experiment: Experiment, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(130));"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60); sys.exit(1)"
    )
    monkeypatch.setattr(reproduce_runs, "RLLIB", [sys.executable, "-c", waits])
    before = signal.getsignal(signal.SIGTERM)
    done = call(places, "tiny")
    assert done.exit_code == 130 and "goes on from the last checkpoint" in done.output
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_begun_is_not_changed(tiny_experiment: Experiment, places: Places) -> None:
    record = places.runs / "tiny" / "experiment.json"
    reproduce.check_unchanged("tiny", tiny_experiment, record)
    reproduce.check_unchanged("tiny", tiny_experiment, record)
    with pytest.raises(ValueError, match=r"tiny was begun with other settings \(seeds\)"):
        reproduce.check_unchanged("tiny", tiny_experiment._replace(seeds=(4,)), record)
    file = Path(tiny_experiment.file)
    file.write_text(f'"""Described."""\n{file.read_text()}# commented\n')
    reproduce.check_unchanged("tiny", tiny_experiment, record)
    file.write_text(file.read_text().replace("horizon_H=2", "horizon_H=3"))
    with pytest.raises(ValueError, match=r"other settings \(code of file\)"):
        reproduce.check_unchanged("tiny", tiny_experiment, record)


def test_an_unknown_experiment_is_refused(places: Places) -> None:
    done = call(places, "cartpol")
    assert done.exit_code == 2 and "EXPERIMENT=cartpol matches none of cartpole," in done.output


def test_all_seeds_reach_a_stop_before_the_next(
    tiny_experiment: Experiment, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[int, int]] = []
    monkeypatch.setattr(
        reproduce_runs.SeedRun, "train", lambda run, stop: done.append((stop, run.seed))
    )
    monkeypatch.setattr(reproduce_runs.SeedRun, "evaluate", lambda run, stop: None)
    monkeypatch.setattr(reproduce_results.Results, "write", lambda *arguments: None)
    monkeypatch.setitem(EXPERIMENTS, "tiny", tiny_experiment._replace(seeds=(3, 4)))
    assert call(places, "tiny").exit_code == 0
    assert done == [(0, 3), (0, 4), (1, 3), (1, 4)]
    done.clear()
    assert call(places, "tiny", "--seed", "4").exit_code == 0
    assert done == [(0, 4), (1, 4)]
    refused = call(places, "tiny", "--seed", "5")
    assert refused.exit_code == 2 and "--seed 5 is not one of tiny" in refused.output


def test_a_seed_that_is_evaluated_elsewhere_is_left_alone(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    """Seeds may run side by side: what another process is at counts once it is complete."""
    both = tiny_experiment._replace(seeds=(3, 4))
    runs = [reproduce_runs.SeedRun(both, seed, tmp_path / "runs") for seed in both.seeds]
    stretch = {"stop": both.stops[0], "begun": "", "seconds": 1.0, "cpu_seconds": 1.0}
    stretch |= {"commit": "", "hardware": "", "reached": True}
    metrics = {"returns": {"mean": 2.0}, "policy": {"agent_steps": 100}, "action_repeat": 1}
    for run in runs:
        evaluation = tmp_path / "runs" / f"seed_{run.seed}_evaluation_0"
        evaluation.mkdir(parents=True)
        (evaluation / "episodes.csv").write_text("episode,seed,return\n0,0,1.0,\n1,1,3.0,\n")
        (tmp_path / "runs" / f"seed_{run.seed}_stretches.json").write_text(json.dumps([stretch]))
    (evaluation / "metrics.json").write_text(json.dumps(metrics))
    points = np.array([50.0, 150.0]), np.array([0.1, 0.2]), np.array([10.0, 30.0])
    trials = {seed: Trial("trial", "CartPole-v1", *points) for seed in both.seeds}
    (stop,) = reproduce_results.summarize(both, runs, trials)["stops"]
    (seed,) = stop["seeds"]
    assert (seed["seed"], seed["training_return"], stop["return"]) == (4, 20.0, 2.0)


def test_a_gpu_is_asked_for(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = call(places, "pong100k_gpu")
    assert done.exit_code == 2 and "pong100k_gpu needs a CUDA device" in done.output


def test_patterns_choose_each_experiment_once() -> None:
    found = reproduce.chosen(["ablation_*", "ablation_none"])
    assert found == [name for name in EXPERIMENTS if name.startswith("ablation_")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_valid_config(name: str) -> None:
    entry = EXPERIMENTS[name]
    options = TrainOptions(set=[*entry.settings, "seed=7"], stop=json.dumps(entry.stops[0]))
    config = experiment_from_file(ROOT / entry.file, options).config
    assert config.seed == 7
    for key, value in dict(setting.split("=") for setting in entry.settings).items():
        found: Any = config.to_dict()
        for part in key.replace("model_config", "_model_config").split("."):
            found = found[part]
        assert json.dumps(found).strip('"') == value
    assert reproduce_results.published(entry, config.env) or entry.reference is None
    assert entry.baseline is None or entry.baseline in EXPERIMENTS
    assert experiments.EVALUATION_SEED > max(entry.seeds) + 1000  # never a start of the training


def test_rows_are_replaced_and_keep_the_order_of_the_experiments(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    reproduce_results.write_rows(page, "walker_vision_cpu", ["| [walker_vision_cpu](x) | old |"])
    reproduce_results.write_rows(page, "cartpole", ["| [cartpole](x) | 1 |"])
    reproduce_results.write_rows(page, "walker_vision_cpu", ["| [walker_vision_cpu](x) | new |"])
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert rows == ["| [cartpole](x) | 1 |", "| [walker_vision_cpu](x) | new |"]
    assert text.startswith("before\n\n") and text.endswith("\n\nafter\n")


def test_the_table_says_what_is_on_record() -> None:
    page, expected = (ROOT / "docs" / "results.md").read_text(), []
    for name, experiment in EXPERIMENTS.items():
        record = ROOT / "results" / name / "summary.json"
        if record.is_file():
            summary = json.loads(record.read_text())
            expected += reproduce_results.table_rows(name, experiment, summary)
    assert [line for line in page.splitlines() if line.startswith("| [")] == expected


@pytest.mark.parametrize(
    ("value", "text", "half"),
    [(500.0, "500.0", "250.0"), (-21.04, "-21.0", "-10.5"), (0.9631, "0.963", "0.482")],
)
def test_returns_of_sparse_tasks_keep_their_digits(value: float, text: str, half: str) -> None:
    measured = {
        **{"stop": {"agent_steps": 10}, "return": value, "interval": [value, value]},
        "seeds": [
            {
                **{"env_steps": 10, "return": value, "training_return": value / 2},
                "episode_returns": [value],
                **{"hours": 1.0, "cpu_hours": 1.0},
                "stretches": [{"hardware": "CPU", "commit": "abc"}],
            }
        ],
    }
    experiment = reproduce_results.Experiment(file="x.py", protocol="P", seeds=(0,), stops=())
    (row,) = reproduce_results.table_rows("x", experiment, {"env": "x", "stops": [measured]})
    assert f"| {text}, {text} to {text} | {text} | {half} | - |" in row


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="needs the lines"):
        reproduce_results.write_rows(page, "cartpole", [])


def test_the_published_return_stands_beside_ours() -> None:
    reference = reproduce_results.published(EXPERIMENTS["walker_vision_cpu"], "dmc/walker-walk")
    assert reference is not None
    at_end = reference.mean_at(float(reference.env_steps[-1]))
    assert at_end == pytest.approx(np.nanmean(reference.episode_return[:, -1]))
    assert np.isnan(reference.mean_at(1.0))


def test_curves_are_drawn_from_their_files(tmp_path: Path) -> None:
    results = reproduce_results.Results(tmp_path, tmp_path / "page.md")
    for name in ("ablation_none", "ablation_bfloat16"):
        folder = tmp_path / name
        folder.mkdir()
        seeds = [{"seed": 0}, {"seed": 1}]  # 2 is of a clone
        summary = {"env": "CartPole-v1", "stops": [{"seeds": seeds}]}
        (folder / "summary.json").write_text(json.dumps(summary))
        for seed in (0, 1, 2):
            points = np.array([10.0, 20.0]), np.array([0.1, 0.2]), np.array([1.0, 2.0 + seed])
            trial = Trial("trial", "CartPole-v1", *points)
            reproduce_results.write_curve(folder / f"seed_{seed}.csv", trial)
    curve = results.curve("ablation_none")
    assert [trial.episode_return.tolist() for trial in curve.trials] == [[1.0, 2.0], [1.0, 3.0]]
    alone = results.picture("ablation_none", EXPERIMENTS["ablation_none"])
    beside = results.picture("ablation_bfloat16", EXPERIMENTS["ablation_bfloat16"])
    assert len(beside) > len(alone)


def test_cpu_time_of_descendants_counts() -> None:
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    hold = f"{child}\ninput()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE) as process:
        clock, used = reproduce_runs.CpuClock(process.pid), 0.0
        while used < 0.3:
            used = clock.read()
            assert process.poll() is None
        process.communicate(b"\n")
    assert clock.read() >= used  # what has ended still counts
