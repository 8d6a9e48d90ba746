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
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rllib_dreamer"
CODE_FOLDERS = ("rllib_dreamer", "tuned_examples", "benchmarks", "scripts")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 450

# A module may import those of a lower rank, and one of its own rank that does not import it back.
# What is in no table may import leaves only.
RANKS = {
    "model.ops": 0,
    "model.distributions": 1,
    "model.nets": 2,
    "model.rssm": 3,
    "model.codec": 3,
    "model.world_model": 4,
    "model.behavior": 4,
    "model.agent": 5,
    "dreamer_catalog": 6,
    "dreamer_env_runner": 7,
    "setting_ranges": 7,
    "dreamer_torch_rl_module": 7,
    "dreamer_config": 8,
    "dreamer_torch_learner": 9,
    "dreamer": 10,
    "registration": 11,
    "": 12,
    "cli": 13,
}
LEAVES = {"model", "model.fuse", "model.optim", "model.sizes"}
LEAVES |= {"model.cuda_graphs", "model.kernels", "model.kernels_build", "model.kernels_rssm"}
# RLlib asks a config for the classes that it configures, so methods of ours name them.
DEFERRED = {"dreamer_config": {"dreamer", "dreamer_torch_learner"}}
KERNELS = {"model.fuse", "model.kernels", "model.kernels_build", "model.kernels_rssm"}
LEAVES |= {"checkpoint", "episode_averages", "hardware", "learner_scaling", "sampling"}
LEAVES |= {"spaces", "training_ratio"}
# Everything but the model may import it, other leaves too.
BASE = "atomic"
LEAVES |= {BASE}
# Modules in several files, whose parts may import one another (`replay_streams` is a part of
# `replay`), and what else each may import.
GROUPS = {
    "replay": {"spaces"},
    "envs": {"spaces"},
    "policy": {
        *("checkpoint", "dreamer", "dreamer_torch_rl_module", "hardware", "registration"),
        *("spaces", ""),
        *("model.agent", "model.codec", "model.distributions", "model.ops", "model.rssm"),
        *("model.sizes", "model.world_model"),
    },
    "evaluation": {
        *("dreamer", "policy", "envs", "spaces"),
        *("model.agent", "model.distributions", "model.rssm"),
    },
}


class Import(NamedTuple):
    """One import of a module of ours; the names are relative to the package."""

    importer: str
    imported: str


def module_name(path: Path, root: Path = PACKAGE) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute_name(node: ast.ImportFrom, path: Path, root: Path) -> str:
    """The module that an `import from` names, with `from .` resolved."""
    if node.level == 0:
        return node.module or ""
    package = [root.name, *path.relative_to(root).parts[:-1]]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def imported_names(path: Path, root: Path = PACKAGE) -> Iterator[str]:
    """Every module named by an import anywhere in a file, absolute; submodules where they exist."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute_name(node, path, root)
            folder = root.parent.joinpath(*module.split("."))
            for alias in node.names:
                file = folder / f"{alias.name}.py"
                is_module = file.exists() or (folder / alias.name / "__init__.py").exists()
                yield f"{module}.{alias.name}" if is_module else module


def our_imports(root: Path = PACKAGE) -> Iterator[Import]:
    for path in sorted(root.rglob("*.py")):
        for name in imported_names(path, root):
            if name.split(".")[0] == root.name:
                yield Import(module_name(path, root), name[len(root.name) + 1 :])


def group_of(module: str) -> str:
    """The entry of the tables that a module counts as: itself, or the module it is a part of."""
    if module in RANKS or module in LEAVES:
        return module
    first = module.split(".")[0]
    if first.startswith("replay_"):
        return "replay"
    return first if first in GROUPS or first in RANKS else module


def is_allowed(entry: Import) -> bool:
    importer, imported = group_of(entry.importer), group_of(entry.imported)
    if imported in DEFERRED.get(importer, ()):
        return True
    if importer == imported and (importer in GROUPS or importer == "cli"):
        return True
    if importer.startswith("model") and not imported.startswith("model"):
        return False
    if importer.startswith("model") and imported in KERNELS and importer not in KERNELS:
        return True
    if imported == BASE:
        return True
    if importer in LEAVES:
        return importer in KERNELS and imported in KERNELS
    if importer in GROUPS:
        return imported in GROUPS[importer]
    if importer not in RANKS:
        return imported in LEAVES
    return imported in LEAVES or imported in GROUPS or RANKS.get(imported, 99) <= RANKS[importer]


def is_mutual(entry: Import, entries: set[Import]) -> bool:
    """True if two modules of the same rank import each other."""
    ranks = [RANKS.get(name) for name in entry]
    back = Import(entry.imported, entry.importer)
    return None not in ranks and ranks[0] == ranks[1] and back in entries


def upward_imports(root: Path = PACKAGE) -> list[str]:
    entries = sorted(set(our_imports(root)))
    found = [e for e in entries if not is_allowed(e) or is_mutual(e, set(entries))]
    return [f"{entry.importer} imports {entry.imported}" for entry in found]


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


def test_imports_go_one_way() -> None:
    assert upward_imports() == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("model/ops.py", "from . import nets", "model.ops imports model.nets"),
        (
            "model/ops.py",
            "from rllib_dreamer.model import codec",
            "model.ops imports model.codec",
        ),
        ("model/agent.py", "from .. import spaces", "model.agent imports spaces"),
        ("replay.py", "import rllib_dreamer.dreamer", "replay imports dreamer"),
        ("dreamer.py", "def f():\n    from .cli import train", "dreamer imports cli.train"),
        ("spaces.py", "from rllib_dreamer.model.sizes import x", "spaces imports model.sizes"),
        ("other.py", "from rllib_dreamer import dreamer", "other imports dreamer"),
        ("atomic.py", "from rllib_dreamer import spaces", "atomic imports spaces"),
    ],
)
def test_an_upward_import_is_noticed(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    root = tmp_path / "rllib_dreamer"
    for name in (
        "model/nets.py",
        "model/codec.py",
        "spaces.py",
        "dreamer.py",
        "cli/train.py",
        file,
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (root / "cli" / "__init__.py").write_text("")
    (root / file).write_text(line)
    assert upward_imports(root) == [complaint]


def test_modules_of_one_rank_may_not_import_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "rllib_dreamer" / "model"
    folder.mkdir(parents=True)
    (folder / "codec.py").write_text("")
    (folder / "rssm.py").write_text("from rllib_dreamer.model import codec")
    assert upward_imports(folder.parent) == []
    (folder / "codec.py").write_text("from rllib_dreamer.model import rssm")
    assert len(upward_imports(folder.parent)) == 2


def test_allowed_imports_raise_no_complaint() -> None:
    allowed = [("replay", "spaces"), ("dreamer_catalog", "spaces"), ("dreamer", "replay")]
    allowed += [("replay_storage", "replay_streams"), ("model.codec", "model.nets")]
    assert all(is_allowed(Import(*pair)) for pair in allowed)


def test_every_model_module_has_a_place_in_the_order() -> None:
    modules = {module_name(path) for path in (PACKAGE / "model").rglob("*.py")}
    assert modules <= RANKS.keys() | LEAVES
    assert "model.world_model" in modules


def test_the_model_imports_neither_ray_nor_gymnasium() -> None:
    files = list((PACKAGE / "model").rglob("*.py"))
    names = {name.split(".")[0] for path in files for name in imported_names(path)}
    assert "torch" in names
    assert names.isdisjoint({"ray", "gymnasium", "gym"})


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


def test_readme_names_the_two_commands_first_and_links_to_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    first_block = readme.split("```")[1]
    assert re.findall(r"^make \w+", first_block, re.M) == ["make train", "make test"]
    links = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_python_in_the_readme_compiles() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    compile(block, "README.md", "exec")


def test_no_file_names_a_path_of_one_machine() -> None:
    # Put together here, so that this file does not name them either.
    folders = "|".join(["work/(main|shared|[.]library)", "root/", "opt/(wheels|pypi)", "tmp/brief"])
    pattern = re.compile(rf"(?<![\w.])/({folders})")
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


def test_with_opengl_setup_is_quiet(tmp_path: Path) -> None:
    venv = fake_venv(tmp_path / "venv", gl_works=True)
    done = run_script("bash", "scripts/setup.sh", "gl", VENV=str(venv), RLLIB_DREAMER_APT="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_a_fitting_python_setup_says_how_to_name_one(tmp_path: Path) -> None:
    environment = {"VENV": str(tmp_path / "venv"), "PYTHON": "no-such-python"}
    done = run_script("bash", "scripts/setup.sh", "install", **environment)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "no Python 3.10, 3.11 or 3.12 among no-such-python" in line
    assert "make PYTHON=" in line


def test_make_lists_its_targets() -> None:
    done = run_script("make", "help")
    targets = {line.split()[1] for line in done.stdout.splitlines()}
    assert {"setup", "train", "test", "test-all", "check", "bench"} <= targets
