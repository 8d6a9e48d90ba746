"""Tests of `rllib evaluate`."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import typer
from tiny import RandomEnv, built, tiny_config
from walking import ARM, CAMERA, Walk, make_policy

from rllib_dreamer import cli
from rllib_dreamer.cli import app as cli_app
from rllib_dreamer.cli.evaluate import environment, summary_lines
from rllib_dreamer.evaluation.environments import build_env
from rllib_dreamer.evaluation.episodes import Rules, play
from rllib_dreamer.evaluation.page import evaluation_page
from rllib_dreamer.evaluation.run import evaluate, write_results
from rllib_dreamer.evaluation.statistics import summarize_episodes
from rllib_dreamer.evaluation.world_model import CONTEXT
from rllib_dreamer.policy.policy import DreamerPolicy

HERE = Path(__file__).resolve().parent
WITHOUT_RAY = """
import sys
import ray
def refuse(*_, **__): raise SystemExit("Ray was started")
ray.init = refuse
from rllib_dreamer import cli
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run on pictures, in an experiment's folder."""
    folder = tmp_path_factory.mktemp("runs") / "experiment" / "trial" / "checkpoint_000000"
    config = tiny_config(
        RandomEnv, observation_space=CAMERA, action_space=ARM, length=12, terminated=False
    )
    with built(config) as algo:
        algo.train()
        algo.save_to_path(folder)
    return folder


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs a command line that is wrong; returns its one line."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("rllib: "), lines
    return lines[0]


class TestCommand:
    @pytest.fixture(scope="class")
    def results(self, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """What the command writes for an experiment's folder, in a process that has no Ray."""
        folder = tmp_path_factory.mktemp("results")
        words = ["evaluate", saved.parents[1], "--episodes", 4, "--num-envs", 2]
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_RAY, *map(str, words), "--save-dir", str(folder)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
        )
        assert done.returncode == 0, done.stderr
        return folder

    def test_what_an_earlier_evaluation_left_goes(self, tmp_path: Path) -> None:
        (tmp_path / "open_loop.mp4").write_bytes(b"of another policy")
        (tmp_path / "notes.mp4").write_bytes(b"not ours")
        env = build_env("CartPole-v1")
        policy = make_policy(env.observation_space, env.action_space)
        rules = Rules(max_steps=2, draw=False)
        found = evaluate(policy, "CartPole-v1", episodes=1, rules=rules)
        names = {path.name for path in write_results(found, tmp_path)}
        assert names == {"metrics.json", "episodes.csv", "report.html"}
        assert {path.name for path in tmp_path.iterdir()} == names | {"notes.mp4"}

    @pytest.mark.parametrize(
        ("config", "rate", "column", "shown"),
        [
            ({}, None, ["", ""], []),
            ({"tells": True}, 0.5, ["1", "0"], ["success     50.0 % of episodes"]),
        ],
    )
    def test_successes(
        self,
        tmp_path: Path,
        config: dict[str, Any],
        rate: float | None,
        column: list[str],
        shown: list[str],
    ) -> None:
        found = evaluate(make_policy(), Walk, config, episodes=2, rules=Rules(draw=False))
        write_results(found, tmp_path)
        assert json.loads((tmp_path / "metrics.json").read_text())["success_rate"] == rate
        with (tmp_path / "episodes.csv").open() as file:
            assert [row["success"] for row in csv.DictReader(file)] == column
        assert [line for line in summary_lines(found) if "success" in line] == shown
        assert ("of episodes" in (tmp_path / "report.html").read_text()) == bool(shown)

    def test_metrics_come_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They tell that an evaluation is complete."""
        found = evaluate(make_policy(), Walk, episodes=1, rules=Rules(max_steps=2))
        write_results(found, tmp_path)

        def full(*arguments: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("rllib_dreamer.evaluation.report.write_report", full)
        with pytest.raises(OSError, match="no space left"):
            write_results(found, tmp_path)
        assert not (tmp_path / "metrics.json").exists()

    def test_a_full_disk_leaves_the_figures_on_the_screen(
        self,
        saved: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def full(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "episodes.csv")

        monkeypatch.setattr("rllib_dreamer.evaluation.run._write_csv", full)
        words = ["evaluate", str(saved), "--episodes", "1", "--max-steps", "2"]
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--save-dir", str(tmp_path)])
        shown = capsys.readouterr()
        assert ended.value.code == 1 and "return " in shown.out
        assert shown.err.count("\n") == 1 and "No space left on device: 'episodes.csv'" in shown.err

    def test_results_have_a_folder_of_their_own(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", str(saved), "--episodes", "1", "--max-steps", "2"])
        assert ended.value.code == 0
        (folder,) = (tmp_path / "evaluations").iterdir()
        assert (folder / "metrics.json").is_file()

    def test_the_config_of_the_training_holds_within_its_family(self) -> None:
        policy = make_policy()
        policy.env, policy.env_config = "dmc/walker-walk", {"action_repeat": 4}
        for env, expected in (
            (None, {"action_repeat": 4, "size": 32}),
            ("DMC/walker/run", {"action_repeat": 4, "size": 32}),
            ("CartPole-v1", {"size": 32}),
        ):
            assert environment(policy, env, {"size": 32}) == (env or policy.env, expected)

    def test_metrics(self, results: Path) -> None:
        found = json.loads((results / "metrics.json").read_text())
        assert found["returns"]["n"] == 4
        assert found["returns"]["mean"] == sum(range(13))
        assert found["lengths"]["mean"] == 12 and found["greedy"] is True
        assert found["returns"]["iqm_low"] <= found["returns"]["iqm"]
        image = found["world_model"]["images"]["camera"]
        assert 0 < image["posterior"]["ssim"] < 1 and image["posterior"]["frames"] == 4 * 13
        assert image["open_loop"]["ahead"]["step"] == list(range(1, 13 - CONTEXT + 1))
        heads = found["world_model"]["heads"]
        assert heads["posterior"]["reward_mae"] > 0 and heads["open_loop"]["cont_brier"] > 0

    def test_episodes(self, results: Path) -> None:
        with (results / "episodes.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["seed"] for row in rows] == ["0", "1", "2", "3"]
        assert {row["end"] for row in rows} == {"truncated"}
        assert {row["return"] for row in rows} == {"78"}

    def test_films(self, results: Path) -> None:
        for name in ("best", "median", "worst"):
            assert imageio_ffmpeg.count_frames_and_secs(str(results / f"{name}.mp4"))[0] == 13
        assert imageio_ffmpeg.count_frames_and_secs(str(results / "open_loop.mp4"))[0] == 13

    def test_report_is_one_file(self, results: Path) -> None:
        page = (results / "report.html").read_text()
        assert page.count("data:video/mp4") == 4 and page.count("data:image/png") >= 4
        assert not re.search(r'(src|href)="(?!data:)', page)
        assert "Open loop" in page and "IQM" in page

    def test_report_says_that_it_fits_a_narrow_screen(self, results: Path) -> None:
        page = (results / "report.html").read_text()
        assert 'name="viewport" content="width=device-width' in page

    def test_an_exported_policy_on_another_env(self, saved: Path, tmp_path: Path) -> None:
        policy = DreamerPolicy.from_checkpoint(saved)
        policy.export(tmp_path / "exported", formats=())
        (tmp_path / "envs.py").write_text(
            "from ray import tune\nfrom walking import Walk\n"
            "class Own(Walk):\n    pass\n"  # of a module that nothing else can import
            "tune.register_env('my-walk', Own)\n"
        )
        with pytest.raises(SystemExit) as ended:
            cli.main(
                [
                    *("evaluate", str(tmp_path / "exported"), "--env", "my-walk"),
                    *("--env-config", '{"length": 6}', "--file", str(tmp_path / "envs.py")),
                    *("--episodes", "2", "--sample", "--seed", "5", "--max-steps", "7"),
                    *("--save-dir", str(tmp_path / "results")),
                ]
            )
        assert ended.value.code == 0
        found = json.loads((tmp_path / "results" / "metrics.json").read_text())
        assert found["env"] == "my-walk" and found["env_config"] == {"length": 6}
        assert found["lengths"]["max"] == 7 and found["episodes_cut"] == 2
        assert found["greedy"] is False and found["seed"] == 5

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["nowhere"], "nowhere does not exist"),
            (["best", "--storage-path", "{tmp}"], "has a finished checkpoint"),
            (["{saved}", "--env-config", "{{"], "--env-config: "),
            (["{saved}", "--env-config", "[1]"], "must be like"),
            (["{saved}", "--file", "gone.py"], "no such file: gone.py"),
            (["{saved}", "--env", "Walker-v99"], "Walker-v99"),
            (["{saved}", "--env", "CartPole-v1"], "the policy was trained on"),
            (["{saved}", "--which", "first"], "must be one of best, last"),
            (["{saved}", "--episodes", "0"], "--episodes"),
            (["{saved}", "--device", "gpu"], "--device: got 'gpu'; must be cpu or cuda"),
            (["{saved}", "--save-dir", "{saved}/manifest.json"], "--save-dir: "),
            (["{saved}", "--save-dir", "/proc"], "--save-dir: /proc: "),
        ],
    )
    def test_mistakes_take_one_line(
        self,
        saved: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        words: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        words = [word.format(saved=saved, tmp=tmp_path) for word in words]
        assert message in fails(capsys, "evaluate", *words)

    def test_an_env_of_an_unnamed_file_asks_for_it(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("rllib_dreamer.cli.evaluate.environment", lambda *_: ("never-made", {}))
        line = fails(capsys, "evaluate", str(saved))
        assert "Unknown env 'never-made'" in line
        assert "If the training's file registers it, add --file FILE.py" in line

    def test_pictures_of_a_long_episode_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rllib_dreamer.evaluation.episodes.MAX_FRAMES", 3)
        (episode,) = play(make_policy(), [build_env(Walk)], 1, Rules(max_steps=5))
        assert episode.length == 5 and episode.frames is not None and len(episode.frames) == 3

    @pytest.mark.parametrize("at", ["reset", "step"])
    def test_an_env_that_raises_takes_one_line(
        self,
        saved: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        at: str,
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("no OpenGL")

        monkeypatch.setattr(RandomEnv, at, fail)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", str(saved)])
        lines = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 1
        assert len(lines) == 1 and f"raised in {at}()" in lines[0] and "no OpenGL" in lines[0]

    def test_an_env_that_cannot_be_built_takes_one_line(
        self, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "own.py").write_text(
            "from ray import tune\nfrom walking import Walk\n"
            "tune.register_env('keyless', lambda config: Walk({'length': config['gone']}))\n"
        )
        words = ["--env", "keyless", "--file", str(tmp_path / "own.py")]
        line = fails(capsys, "evaluate", str(saved), *words)
        assert "the environment 'keyless' cannot be built: KeyError: 'gone'" in line

    def test_episodes_without_end_are_pointed_out(
        self,
        saved: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("rllib_dreamer.cli.evaluate.LONG_EPISODES", 3)
        words = ["evaluate", str(saved), "--episodes", "1", "--save-dir", str(tmp_path)]
        for steps, told in ((5, 1), (2, 0)):
            with pytest.raises(SystemExit):
                cli.main([*words, "--max-steps", str(steps)])
            assert capsys.readouterr().out.count("no episode has ended yet: --max-steps") == told

    def test_returns_of_sparse_tasks_keep_their_digits(self) -> None:
        found = evaluate(make_policy(), Walk, episodes=1, rules=Rules(max_steps=2, draw=False))
        for value, text in ((0.9634, "0.963"), (52.34, "52.3")):
            summary = summarize_episodes([value] * 4, [2] * 4)
            known = dataclasses.replace(found, summary=summary)
            assert f"IQM         {text}, 95 % interval {text} to {text}" in summary_lines(known)
            shown = evaluation_page(known).numbers[0]
            assert shown.value == text

    def test_a_broken_file_is_named(
        self, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "bad.py").write_text("1 / 0")
        line = fails(capsys, "evaluate", str(saved), "--file", str(tmp_path / "bad.py"))
        assert "bad.py, line 1, fails: ZeroDivisionError" in line

    def test_a_missing_extra_takes_one_line(self) -> None:
        """In a process of its own, in which what the extra brings cannot be imported."""
        code = """
import sys
for name in ("matplotlib", "torchmetrics", "imageio_ffmpeg"):
    sys.modules[name] = None
from rllib_dreamer import cli
for words in (["evaluate", "--episodes", "3", "x"], ["plot", "y"], ["--help"]):
    try:
        cli.main(words)
    except SystemExit as ended:
        print("code", ended.code, file=sys.stderr)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert re.findall(r"code (\d)", done.stderr) == ["2", "2", "0"], done.stderr
        for command in ("evaluate", "plot"):
            line = rf'rllib: {command} needs \w+, .*; type: pip install "rllib-dreamer\[eval\]"'
            assert re.search(line, done.stderr), done.stderr
            assert command in done.stdout

    def test_commands_are_imported_when_they_are_used(self) -> None:
        code = "import sys; import rllib_dreamer.cli.app; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "rllib_dreamer.cli.app" in done.stdout, done.stderr
        assert not {"matplotlib", "torchmetrics"} & set(done.stdout.split())

    def test_the_docs_name_every_option(self) -> None:
        page = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text()
        options = [
            name
            for option in typer.main.get_command(cli_app.app).get_command(None, "evaluate").params
            for name in option.opts
            if name.startswith("--") and name != "--verbose"
        ]
        assert len(options) > 8
        assert [name for name in options if f"`{name}`" not in page] == []

    def test_plot_is_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["plot", str(tmp_path)])
        assert ended.value.code == 2
        assert "holds no result.json" in capsys.readouterr().err
