"""Which folder a command writes to: new ones, marks, and locks while a command trains."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from rllib_dreamer.cli import evaluate, train
from rllib_dreamer.cli.app import run
from rllib_dreamer.cli.errors import CommandError

FILE = """
from ray.rllib.algorithms.ppo import PPOConfig
config = PPOConfig().environment("CartPole-v1")
"""


class Command:
    """Runs `rllib train file` up to where Tune would begin, and there does what a test wants."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file, self.storage, self.capsys = folder / "own.py", folder / "results", capsys
        self.file.write_text(FILE)
        self.folders: list[Path] = []
        self.train: Callable[[Path], Any] = start_experiment

    def __call__(self, *words: object, file: Path | None = None) -> int:
        place = ["--storage-path", self.storage]
        return run([str(word) for word in ["train", "file", file or self.file, *words, *place]])

    def error(self) -> str:
        return self.capsys.readouterr().err

    def tune(self, experiment: Any, options: Any, folder: Path, *others: Any) -> Any:
        self.folders.append(folder)
        self.train(folder)
        return Results()


class Results(list[Any]):
    """No results of no trials."""

    errors: tuple[()] = ()


def start_experiment(folder: Path, mark: str = "own\n", age: float = 0) -> Path:
    """Writes what an experiment is found by, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "experiment_state-2026-01-31_09-05-00.json"
    state.touch()
    os.utime(state, (1e9 - age, 1e9 - age))
    if not (folder / "rllib_dreamer.txt").exists():
        (folder / "rllib_dreamer.txt").write_text(mark)
    return folder


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    @contextmanager
    def no_session(*args: Any) -> Iterator[bool]:
        yield False

    made = Command(tmp_path, capsys)
    monkeypatch.setattr(train, "ray_session", no_session)
    monkeypatch.setattr(train, "lacking_resources", lambda config: None)
    monkeypatch.setattr(train, "_run", made.tune)
    return made


# ---- new folders ----


def test_commands_of_the_same_second_have_folders_of_their_own(command: Command) -> None:
    def train_another(folder: Path) -> None:
        start_experiment(folder)
        if len(command.folders) < 6:  # in less than five seconds
            assert command() == 0

    command.train = train_another
    assert command() == 0
    assert len({*command.folders}) == 6


def test_a_name_is_given_once(command: Command) -> None:
    command.train = lambda folder: codes.append(command("--name", "one"))
    codes: list[int] = []
    assert command("--name", "one") == 0
    assert codes == [2]
    assert "another command trains in" in command.error()
    start_experiment(command.storage / "one")
    assert command("--name", "one") == 2
    assert "add --resume, or choose another --name" in command.error()


def test_one_command_begins_a_run_and_goes_on_with_it(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    tune = train._run

    def watched(experiment: Any, options: Any, *others: Any) -> Any:
        seen.append(options.resume)
        return tune(experiment, options, *others)

    monkeypatch.setattr(train, "_run", watched)
    assert command("--name", "one", "--resume-or-start") == 0
    assert command("--name", "one", "--resume-or-start") == 0
    assert command("--name", "one", "--resume-or-start", "--num-samples", 3) == 0
    assert seen == [None, "", ""]
    assert command.folders == [command.storage / "one"] * 3
    assert command("--resume-or-start") == 2
    assert "--resume-or-start: needs --name NAME" in command.error()
    assert command("--resume-or-start", "--name", "one", "--resume") == 2
    start_experiment(command.storage / "two", mark="another\n")
    assert command("--name", "two", "--resume-or-start") == 2
    assert "is a run of another" in command.error()


def test_a_file_sent_along_with_a_job_is_known_by_its_name(command: Command) -> None:
    """Ray unpacks it into a folder that is named by all files of the working directory."""
    sent = [command.storage.parent / f"_ray_pkg_{number}" / "own.py" for number in "12"]
    for file in sent:
        file.parent.mkdir()
        file.write_text(FILE)
    assert command("--name", "one", file=sent[0]) == 0
    assert command("--name", "one", "--resume", file=sent[1]) == 0


def test_a_name_of_a_command_that_was_killed_before_training_is_free(command: Command) -> None:
    (command.storage / "one").mkdir(parents=True)
    for first in ("rllib_dreamer.lock", "tuner.pkl"):
        (command.storage / "one" / first).touch()
    assert command("--name", "one") == 0


def test_no_callbacks_are_none_of_ones_own(command: Command) -> None:
    assert command("--set", "callbacks=None") == 0


def test_a_run_that_never_began_leaves_no_folder(command: Command) -> None:
    def refuse(folder: Path) -> None:
        raise CommandError("the config needs 501 CPUs")

    command.train = refuse
    assert command("--name", "one") == 2
    command.train = start_experiment
    assert command("--name", "one") == 0
    assert [path.name for path in command.storage.iterdir()] == ["one"]


def test_a_storage_that_cannot_be_written_to_is_named(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(parent: Path, prefix: str) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(parent / prefix))

    monkeypatch.setattr(train, "make_dated_folder", refuse)
    assert command() == 2
    error = command.error()
    assert error.count("\n") == 1 and "Permission denied" in error
    assert f"--storage-path: {command.storage}" in error


def test_evaluations_of_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.chdir(tmp_path)
    for name in ("_load", "_play", "summary_lines"):
        monkeypatch.setattr(evaluate, name, lambda *args: [])
    monkeypatch.setattr(evaluate, "environment", lambda *args: ("CartPole-v1", {}))
    monkeypatch.setattr(evaluate, "write_results", lambda _, folder: folders.append(folder) or [])
    for _ in range(4):  # in less than three seconds
        assert run(["evaluate", "best"]) == 0
    assert len({*folders}) == 4


# ---- locks ----


def test_resume_leaves_a_live_run_alone(command: Command) -> None:
    older = start_experiment(command.storage / "older", age=60)

    def train_another(folder: Path) -> None:
        start_experiment(folder)
        command.train = start_experiment
        assert command("--resume") == 0
        assert command.folders[1:] == [older]
        for words in (["--resume", folder], ["--resume", "--name", "live"]):
            assert command(*words) == 2
            error = command.error()
            assert f"another command trains in {folder}" in error and error.count("\n") == 1

    command.train = train_another
    assert command("--name", "live") == 0
    assert command("--resume", command.storage / "live") == 0


def test_resume_says_so_if_all_runs_are_live(command: Command) -> None:
    def train_another(folder: Path) -> None:
        start_experiment(folder)
        assert command("--resume") == 2

    command.train = train_another
    assert command() == 0
    assert "another command trains in" in command.error()


def test_a_killed_run_does_not_block(command: Command) -> None:
    folder = start_experiment(command.storage / "killed")
    code = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); time.sleep(600)"
    )
    words = [sys.executable, "-c", code, str(folder / "rllib_dreamer.lock")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert command("--resume", folder) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert command("--resume", folder) == 0


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), NotImplementedError()])
def test_without_locks_the_run_goes_on(
    command: Command, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", fail)
    assert command("--name", "remote") == 0
    assert command("--resume") == 0


# ---- marks ----


def test_a_run_of_another_file_is_refused_and_left_as_it_was(command: Command) -> None:
    folder = start_experiment(command.storage / "his", mark="other\n")
    for words in (["--resume", folder], ["--resume", "--name", "his"]):
        assert command(*words) == 2
        error = command.error()
        assert f"{folder} is a run of other, not of {command.file}; " in error
        assert f"or remove {folder / 'rllib_dreamer.txt'}" in error
    assert command.folders == []
    (folder / "rllib_dreamer.txt").unlink()
    assert command("--resume", folder) == 0


def test_a_file_of_the_same_name_is_another_one_while_both_are_there(
    command: Command, tmp_path: Path
) -> None:
    twin = tmp_path / "twin" / "own.py"
    twin.parent.mkdir()
    twin.write_text(FILE)
    folder = start_experiment(command.storage / "his", mark=f"own\n{twin}\n")
    assert command("--resume") == 2
    assert "no experiment of own in" in command.error()
    assert command("--resume", folder) == 2
    assert f"is a run of {twin}, not of {command.file}" in command.error()
    assert command("--resume", file=twin) == 0
    twin.unlink()  # moved, or on another machine
    assert command("--resume") == command("--resume", folder) == 0
