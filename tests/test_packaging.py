"""The house rules that can be read from the files: imports, sizes, metadata, set-up scripts."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rllib_dreamer.envs.rendering import INSTALL_HINT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rllib_dreamer"
CODE_FOLDERS = ("rllib_dreamer", "tuned_examples", "benchmarks", "scripts")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 450


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.split(";")[0].strip().split("==") for line in lines if "==" in line[:60])
    return {name.lower().replace("_", "-"): version for name, version in pins if "#" not in name}


def code_files() -> list[Path]:
    return [path for folder in CODE_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its `def` on, without its docstring."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is None:
        return total
    docstring = node.body[0]
    return total - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def text_files() -> Iterator[Path]:
    folders = (*CODE_FOLDERS, "tests", "docs", ".ci")
    suffixes = {".py", ".md", ".sh", ".toml", ".txt", ".csv", ".json", ".html", ""}
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in [*paths, *ROOT.glob("*"), ROOT / ".gitignore"]:
        if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts:
            yield path


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {body_lines(node)} lines"
        for path in code_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and body_lines(node) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in code_files()}
    assert len(lengths) > 20
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_FILE_LINES}
    assert long == {}


def test_versions_agree() -> None:
    import rllib_dreamer

    assert pyproject()["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", rllib_dreamer.__version__)
    assert importlib.metadata.version("rllib-dreamer") == rllib_dreamer.__version__


def test_core_dependencies_pin_neither_gymnasium_nor_cuda() -> None:
    core = pyproject()["project"]["dependencies"]
    assert "gymnasium" in core
    assert "ray[rllib]>=2.60,<3" in core
    assert not [name for name in core if re.search(r"cuda|cu1\d|nvidia|\+", name)]


@pytest.mark.parametrize(
    ("extra", "bound"),
    [
        ("dmc", "dm_control==1.0.41"),
        ("dmc", "mujoco==3.8.1"),
        ("robosuite", "robosuite==1.5.2"),
        ("robosuite", "mujoco>=3.3,<3.10"),
        ("robosuite", "numpy<2"),
        ("robosuite", "pyarrow<26"),
        ("robosuite", "opencv-python<4.12"),
        ("robosuite", "h5py>=3.11"),
        ("supersuit", "pettingzoo>=1.24,<2"),
    ],
)
def test_extras_carry_the_bounds_that_make_them_run(extra: str, bound: str) -> None:
    assert bound in pyproject()["project"]["optional-dependencies"][extra]


def test_only_robosuite_holds_numpy_back() -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    held = {name for name, needs in extras.items() if any("numpy<2" in need for need in needs)}
    assert held == {"robosuite"}


def test_all_is_every_extra_of_a_user() -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    (names,) = re.findall(r"\[(.+)\]", extras["all"][0])
    assert set(names.split(",")) == extras.keys() - {"all", "dev"}


def test_constraints_pin_everything_that_is_declared() -> None:
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *(need for extra in extras.values() for need in extra)]
    names = {re.split(r"[\[<>=!; ]", need)[0].lower().replace("_", "-") for need in declared}
    # tomli is for Python 3.10 alone, which the pinned set was not made with.
    assert names - {"rllib-dreamer", "tomli"} <= constraints().keys()
    assert constraints()["torch"] == "2.13.0"
    assert constraints()["mujoco"] == "3.8.1"


def test_a_pin_without_a_marker_allows_every_python_that_is_declared() -> None:
    specifiers = importlib.import_module("packaging.specifiers")
    oldest = pyproject()["project"]["requires-python"].removeprefix(">=")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    unmarked = [line.partition("==")[0] for line in lines if "==" in line and ";" not in line]
    checked = 0
    for name in (name for name in unmarked if "#" not in name):
        with suppress(importlib.metadata.PackageNotFoundError):
            needs = importlib.metadata.metadata(name)["Requires-Python"] or ""
            assert specifiers.SpecifierSet(needs).contains(oldest), (name, needs)
            checked += 1
    assert checked > 40


def test_constraints_are_within_the_declared_bounds() -> None:
    packaging_requirements = importlib.import_module("packaging.requirements")
    extras = pyproject()["project"]["optional-dependencies"]
    needs = [
        packaging_requirements.Requirement(need) for extra in extras.values() for need in extra
    ]
    pins = constraints()
    for need in needs:
        name = need.name.lower().replace("_", "-")
        if name in pins:
            assert need.specifier.contains(pins[name], prereleases=True), f"{need} != {pins[name]}"


@pytest.mark.parametrize("command", ["rllib", "rllib-dreamer"])
def test_console_script_resolves(command: str) -> None:
    module, function = pyproject()["project"]["scripts"][command].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    assert entry.value == f"{module}:{function}"


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_licence_is_there() -> None:
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert pyproject()["project"]["license"] == "MIT"


def test_readme_names_the_two_commands_first() -> None:
    readme = (ROOT / "README.md").read_text()
    first_block = readme.split("```")[1]
    assert re.findall(r"^make \w+", first_block, re.M) == ["make train", "make test"]
    assert readme.count("```python\n") == 1
    assert re.search(r"\]\((?!https?:)", readme)  # test_docs follows the links, runs the Python


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.}])/(home|root|Users|work|opt|tmp)/[.\w]")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in text_files()
        for match in pattern.finditer(path.read_text(errors="replace"))
    ]
    assert found == []


def run_script(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_the_gl_check_draws() -> None:
    done = run_script(sys.executable, "scripts/check_headless_gl.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Headless OpenGL works (")


def test_the_gl_check_says_in_one_line_what_is_wrong() -> None:
    done = run_script(sys.executable, "scripts/check_headless_gl.py", MUJOCO_GL="disable")
    assert done.returncode == 1
    assert re.fullmatch(r"Headless OpenGL does not work: .*MUJOCO_GL.*\n", done.stderr)


def fake_venv(folder: Path, gl_works: bool) -> Path:
    """A `bin/python` that answers only the OpenGL check."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {0 if gl_works else 1}\n")
    python.chmod(0o755)
    return folder


def test_without_opengl_setup_says_the_one_line_to_type(tmp_path: Path) -> None:
    venv = fake_venv(tmp_path / "venv", gl_works=False)
    environment = {"VENV": str(venv), "RLLIB_DREAMER_APT": "0", "MUJOCO_GL": ""}
    done = run_script("bash", "scripts/setup.sh", "gl", **environment)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "apt-get install -y --no-install-recommends libegl1 libgl1" in line
    packages = line.partition("--no-install-recommends ")[2]
    assert f"--no-install-recommends {packages}`" in INSTALL_HINT


def test_with_opengl_setup_is_quiet(tmp_path: Path) -> None:
    venv = fake_venv(tmp_path / "venv", gl_works=True)
    done = run_script("bash", "scripts/setup.sh", "gl", VENV=str(venv), RLLIB_DREAMER_APT="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("made_before", [False, True])
def test_without_a_fitting_python_setup_says_how_to_name_one(
    made_before: bool, tmp_path: Path
) -> None:
    venv = fake_venv(tmp_path / "venv", gl_works=True) if made_before else tmp_path / "venv"
    environment = {"VENV": str(venv), "PYTHON": "no-such-python"}
    done = run_script("bash", "scripts/setup.sh", "install", **environment)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "no Python 3.10, 3.11 or 3.12 among no-such-python" in line
    assert "make PYTHON=" in line


def test_make_lists_its_targets() -> None:
    done = run_script("make", "help")
    targets = {line.split()[1] for line in done.stdout.splitlines()}
    assert {"setup", "train", "test", "test-all", "check", "bench"} <= targets
