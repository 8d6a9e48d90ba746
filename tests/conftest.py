"""The `--golden` option, the files that it selects and the summary of their errors.

And for all tests: no limit of time for slow ones, and no folders left in `~/ray_results`.
"""

from __future__ import annotations

import faulthandler
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"

Errors = dict[str, dict[str, float]]
ERRORS = pytest.StashKey[Errors]()  # group -> file -> largest relative error
UNCOMPARED = pytest.StashKey[
    dict[str, list[str]]
]()  # file -> results that nothing was held against


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    parser.addoption(
        "--golden",
        metavar="DIR",
        type=Path,
        help="folder of golden .npz files (default: tests/data)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Prepares the summary; with tiny models one thread is the fastest, and runs are repeatable.

    Ray's token is that of the session, whatever home folder a test works in; its workers run at
    the priority of the tests, as at their own low one whatever else runs would hold them up.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_worker_niceness", "0")
    config.stash[ERRORS] = {}
    config.stash[UNCOMPARED] = {}
    golden_folder(config)  # a wrong option is refused before anything runs
    torch.set_num_threads(1)


def golden_folder(config: pytest.Config) -> Path:
    """The folder of golden files.

    Raises:
        pytest.UsageError: If the folder given holds no .npz file.
    """
    folder: Path = config.getoption("golden") or DATA
    if not any(folder.glob("*.npz")):
        raise pytest.UsageError(f"--golden={folder}: found no .npz file; give a folder of them.")
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that asks for `golden_path` once for every whole-loss file."""
    if "golden_path" in metafunc.fixturenames:
        paths = sorted(golden_folder(metafunc.config).glob("*.npz"))
        paths = [path for path in paths if path.stem != "units"]
        ids = [path.stem for path in paths]
        metafunc.parametrize("golden_path", paths, ids=ids, scope="session")


@pytest.fixture(scope="session")
def units_path(pytestconfig: pytest.Config) -> Path:
    """The file of single functions: of the folder, else the copy beside the tests."""
    path = golden_folder(pytestconfig) / "units.npz"
    return path if path.exists() else DATA / "units.npz"


@pytest.fixture(scope="session")
def note_error(pytestconfig: pytest.Config) -> Callable[[str, str, float], float]:
    """A function (group, file, relative error) that keeps the largest and returns the error."""

    def note(group: str, file: str, error: float) -> float:
        keep_error(pytestconfig, group, file, error)
        return error

    return note


def keep_error(config: pytest.Config, group: str, file: str, error: float) -> None:
    """Keeps the largest error of a group and file for the summary."""
    files = config.stash[ERRORS].setdefault(group, {})
    files[file] = max(error, files.get(file, 0.0))


@pytest.fixture(scope="session")
def note_uncompared(pytestconfig: pytest.Config) -> Callable[[str, list[str]], None]:
    """A function (file, keys) for results of a file that our model gives nothing for."""

    def note(file: str, keys: list[str]) -> None:
        pytestconfig.stash[UNCOMPARED][file] = keys

    return note


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves slow tests the time that they take; what they start has limits of its own."""
    if item.get_closest_marker("slow"):
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session", autouse=True)
def ray_results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Algorithms that are built outside of Tune make their folders in a temporary one."""
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules.get("ray.tune.trainable.trainable")
        if module is not None:  # it is needed by no test that was collected
            folder = str(tmp_path_factory.mktemp("ray_results"))
            patch.setattr(module, "DEFAULT_STORAGE_PATH", folder)
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands the errors of a process of pytest-xdist to the one that prints the summary."""
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["golden"] = config.stash[ERRORS], config.stash[UNCOMPARED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes them over; a process that crashed has none."""
    errors, uncompared = getattr(node, "workeroutput", {}).get("golden", ({}, {}))
    for group, files in errors.items():
        for file, error in files.items():
            keep_error(node.config, group, file, error)
    node.config.stash[UNCOMPARED].update(uncompared)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints the largest relative error of each group and file."""
    errors = config.stash[ERRORS]
    if not errors:
        return
    files = sorted({file for row in errors.values() for file in row})
    width = max(len(group) for group in errors)
    terminalreporter.section("golden: largest relative error")
    header = [f"{file:>{max(9, len(file))}}" for file in files]
    terminalreporter.write_line("  ".join([" " * width, *header]))
    for group, row in errors.items():
        cells = [f"{row[f]:.1e}" if f in row else "-" for f in files]
        line = [f"{cell:>{len(head)}}" for cell, head in zip(cells, header, strict=True)]
        terminalreporter.write_line("  ".join([f"{group:<{width}}", *line]))
    for file, keys in config.stash[UNCOMPARED].items():
        terminalreporter.write_line(f"{file}: not compared: {', '.join(keys)}")
