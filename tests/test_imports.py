"""Imports go one way: what each module of the package may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from test_packaging import PACKAGE

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
    "setting_checks": 7,
    "learner_scaling": 7,
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
LEAVES |= {"box_checks", "checkpoint", "episode_averages", "hardware", "learner_calls"}
LEAVES |= {"near_names", "part_rates", "sampling", "spaces", "training_ratio"}
# Everything but the model may import it, other leaves too.
BASE = "atomic"
LEAVES |= {BASE}
# Modules in several files, whose parts may import one another (`replay_streams` is a part of
# `replay`), and what else each may import.
GROUPS = {
    "replay": {"box_checks", "spaces"},
    "envs": {"box_checks", "near_names", "spaces"},
    "policy": {
        *("box_checks", "checkpoint", "dreamer", "dreamer_torch_rl_module", "hardware"),
        *("registration", "spaces", ""),
        *("model.agent", "model.behavior", "model.codec", "model.distributions", "model.ops"),
        *("model.rssm", "model.sizes", "model.world_model"),
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
