"""Runs of the `rllib` command: of our algorithm from a file, resumed, stopped and failing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import PPO_FILE, STARTED, Finished, finish, iterations, marks, start, wait_for
from tiny import start_ray

from rllib_dreamer.cli.app import run
from rllib_dreamer.cli.errors import CommandError
from rllib_dreamer.cli.folders import Mark, find_experiments

DREAMER_FILE = """
from ray.tune import register_env
from tiny import CountingEnv, tiny_config

class OwnEnv(CountingEnv):
    pass

register_env("own-counting", lambda config: OwnEnv(config))
config = tiny_config("own-counting", training={"training_ratio": 16})
config.reporting(min_sample_timesteps_per_iteration=50)
stop = {"training_iteration": 2}
"""


class Trained(NamedTuple):
    """A finished run and its experiment folder."""

    finished: Finished
    folder: Path


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """A test that fails half-way must not leave its run behind."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.wait()
    STARTED.clear()


@pytest.fixture(scope="module")
def own_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("files") / "own.py"
    file.write_text(DREAMER_FILE)
    return file


@pytest.fixture(scope="module")
def trained(own_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    storage = tmp_path_factory.mktemp("results")
    words = ["train", "file", own_file, "--storage-path", storage, "--name", "short"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        finished = finish(start(*words, "--checkpoint-freq", 1))
    return Trained(finished, storage / "short")


def results(folder: Path) -> list[dict[str, Any]]:
    """All results of the one trial."""
    (file,) = folder.glob("*/result.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_reports_and_names_its_checkpoints(trained: Trained) -> None:
    code, out, err = trained.finished
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "until training_iteration >= 2" in out
    for start_up in ("learners     1 x cpu", "replay       "):
        assert any(line.startswith(start_up) for line in lines)
    assert "env steps" in out and "nan" not in out.lower()
    best, last, evaluation = lines[-3:]
    assert best.startswith("best checkpoint: ") and last.startswith("last checkpoint: ")
    path = last.removeprefix("last checkpoint: ").partition(" (return ")[0]
    assert (Path(path) / "rllib_checkpoint.json").is_file()
    assert evaluation.startswith(f"evaluate it: rllib evaluate {trained.folder}")
    assert iterations(trained.folder) == marks(trained.folder) == [1, 2]
    assert results(trained.folder)[-1]["dreamer"]["updates"] > 0


def test_an_existing_experiment_is_not_mixed_up(
    trained: Trained, own_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--storage-path", str(trained.folder.parent), "--name", "short"]
    assert run(["train", "file", str(own_file), *place]) == 2
    assert "add --resume, or choose another --name" in capsys.readouterr().err


def test_find_experiments(trained: Trained, own_file: Path) -> None:
    storage, own = trained.folder.parent, Mark("own", own_file.resolve())
    checkpoint = next(trained.folder.glob("*/checkpoint_*"))
    assert find_experiments(str(checkpoint), storage, None, own) == [trained.folder]
    assert find_experiments("", storage, "short", own) == [trained.folder]
    with pytest.raises(CommandError, match=r"no experiment 'shrt'.*did you mean short"):
        find_experiments("", storage, "shrt", own)
    with pytest.raises(CommandError, match="no experiment of another in"):
        find_experiments("", storage, None, Mark("another"))
    dated, other = storage / "own_2026-01-31_09-05-00", storage / "own_other_2026-01-31_09-06-00"
    shutil.copytree(trained.folder, dated)
    shutil.copytree(trained.folder, other)  # of another file, and newer
    (other / "rllib_dreamer.txt").write_text("own_other\n")
    os.utime(next(dated.glob("experiment_state-*")), (0, 0))
    found = find_experiments("", storage, None, own)  # by the file, not the name
    assert found == [trained.folder, dated]
    shutil.rmtree(dated)
    shutil.rmtree(other)


def test_resume_survives_a_half_written_state_and_checkpoint(
    trained: Trained, own_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(trained.folder, folder)
    state = max(folder.glob("experiment_state-*.json"))
    state.write_text(state.read_text()[:1000])
    trial = next(folder.glob("DreamerTorch_*"))
    shutil.copytree(trial / "checkpoint_000001", trial / "checkpoint_000002")
    for part in (".metadata.json", "rllib_checkpoint.json"):
        (trial / "checkpoint_000002" / part).unlink()

    start_ray()
    words = ["train", "file", str(own_file), "--resume", str(folder), "--checkpoint-freq", "1"]
    assert run([*words, "--stop", '{"iterations": 4}', "--set", "lr=0.0005"]) == 0
    out = capsys.readouterr().out
    assert "resuming after iteration 2\nchanged since: lr 0.001 -> 0.0005\n" in out
    assert iterations(folder) == [1, 2, 3, 4]
    found = results(folder)
    assert found[-1]["num_env_steps_sampled_lifetime"] == 4 * 50
    assert found[2]["dreamer"]["updates"] > found[1]["dreamer"]["updates"]
    assert found[-1]["config"]["lr"] == 0.0005
    assert str(folder) in out.splitlines()[-1]


def test_resume_goes_back_to_the_checkpoint_named(
    trained: Trained, own_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "back"
    shutil.copytree(trained.folder, folder)
    (first,) = folder.glob("*/checkpoint_000000")
    start_ray()
    words = ["train", "file", str(own_file), "--resume", str(first), "--checkpoint-freq", "1"]
    assert run([*words, "--stop", '{"iterations": 2}']) == 0
    out = capsys.readouterr().out
    assert "resuming after iteration 1\n" in out and "changed since" not in out
    assert iterations(folder) == [1, 2, 2]
    assert (first.parent / "checkpoint_000002").is_dir()


def test_ctrl_c_leaves_a_checkpoint_and_kill_9_can_be_resumed(tmp_path: Path) -> None:
    """Of a file with a module of its own beside it."""
    file, folder = tmp_path / "own.py", tmp_path / "run"
    env = "class OwnEnv(gymnasium.Wrapper):\n    pass\n"
    (tmp_path / "beside.py").write_text(f"import gymnasium\n{env}")
    (tmp_path / "gymnasium.py").write_text("raise ImportError('it hides the package')\n")
    file.write_text(PPO_FILE.replace(env, "from beside import OwnEnv\n"))
    words = ["train", "file", file, "--storage-path", tmp_path, "--name", "run"]
    process = start(*words, "--checkpoint-freq", 5, "--stop", "{}")
    wait_for(lambda: len(marks(folder)) >= 2 and any(folder.glob("*/progress.csv")))
    process.kill()
    finish(process)
    saved = max(marks(folder))

    before = len(iterations(folder))
    (results,) = folder.glob("*/result.json")
    tables = [results, results.with_name("progress.csv")]
    for table in tables:
        with table.open("a") as rows:
            rows.write('{"cut short')
    process = start(*words, "--resume", "--checkpoint-freq", 1000, "--stop", "{}")
    wait_for(lambda: len(iterations(folder)) > before + 1)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (130, "")
    assert f"resuming after iteration {saved}\n" in out
    assert iterations(folder)[before] == saved + 1
    assert "stopping after the current iteration" in out
    assert max(marks(folder)) == iterations(folder)[-1]
    assert not any("cut short" in table.read_text() for table in tables)


def test_a_failing_run_is_one_line_and_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.py"
    broken = PPO_FILE.replace(
        "    pass", "    def step(self, action):\n        raise OSError('no')"
    )
    file.write_text(broken)
    start_ray()
    assert run(["train", "file", str(file), "--storage-path", str(tmp_path), "--name", "x"]) == 1
    out, err = capsys.readouterr()
    assert "no checkpoint was saved" in out
    assert err.splitlines() == [err.strip()] and err.startswith("rllib: the run failed: ")
    assert "OSError: no" in err and "; the traceback is in " in err
    told = Path(err.strip().rpartition(" is in ")[2])
    assert told.parents[1] == tmp_path / "x" and "raise OSError('no')" in told.read_text()


def test_a_config_too_large_for_the_machine_is_told_at_once(
    own_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_ray()
    words = ["train", "file", str(own_file), "--storage-path", str(tmp_path)]
    assert run([*words, "--set", "num_env_runners=500"]) == 2
    assert "needs 501 CPUs" in capsys.readouterr().err
