"""Every benchmark runs, in its smallest form, and writes the keys that its README names."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from tiny import start_ray
from typer.testing import CliRunner

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
KEYS = {"title", "machine", "figures", "details"}
MACHINE = {"cpu", "cores", "flags", "memory_gib", "gpu", "python", "torch", "load", "date"}
FIGURE = {"what", "value", "unit", "least", "most", "beside", "ratio", "target", "target_ratio"}
FIGURE |= {"higher", "met"}

SMALL = {
    "train_step": "--size 1M --batch 2 --length 4 --rounds 2 --warmup 0 --threads 1",
    "policy_step": "--size 1M --steps 2",
    "replay": "--capacity 1000 --deter 32 --rounds 1",
    "env_step": "--only CartPole --rounds 1 --seconds 0.01",
    "runners": "--env noise --runners 0 --envs 2 --rounds 1 --seconds 0.01",
    "memory": "--batch 2 --length 8 --capacity 40 --minutes 0",
    "loop": "--env noise --batch 2 --length 8 --ratio 16 --updates 2 --seconds 0",
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    start_ray()  # a benchmark would start one whose workers can't import what tests define


class HereProgram:
    """A program of a benchmark in this process; to it goes what can go to another process."""

    def __init__(self, build: Callable[..., Any], *args: Any) -> None:
        self.built = pickle.loads(pickle.dumps(build))(*args)

    def ask(self, function: Callable[[Any], Any]) -> Any:
        return pickle.loads(pickle.dumps(function))(self.built)

    def close(self) -> None:
        self.built.stop()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Loads a benchmark of which a process, or updates, are left out that only take time."""

    def loaded(name: str) -> ModuleType:
        module = load(name)
        if name == "runners":
            monkeypatch.setattr(module, "Program", HereProgram)
            monkeypatch.setattr(module.ray, "init", lambda *args, **options: None)
        if name == "memory":
            build, often = module.build, {"training_ratio": 16}
            monkeypatch.setattr(module, "build", lambda *args: build(*args[:-1], args[-1] | often))
        return module

    return loaded


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def invoke(module: ModuleType, *arguments: str) -> None:
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def checked(path: Path) -> list[dict[str, Any]]:
    """The figures of a JSON file, after a look at its keys."""
    content = json.loads(path.read_text())
    assert content.keys() == KEYS
    assert content["machine"].keys() == MACHINE
    for row in content["figures"]:
        assert row.keys() == FIGURE
        assert row["value"] > 0 and row["what"]
    assert len({row["what"] for row in content["figures"]}) == len(content["figures"]) > 0
    return content["figures"]


def names(figures: list[dict[str, Any]]) -> list[str]:
    """What was measured, without the part that names the configuration."""
    return [row["what"].split(", ")[-1] for row in figures]


@pytest.mark.parametrize("name", SMALL)
def test_benchmark_writes_the_documented_keys(
    name: str, brief: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    path = tmp_path / "figures.json"
    invoke(brief(name), *SMALL[name].split(), "--json", str(path))
    figures = checked(path)
    if name == "train_step":
        assert names(figures)[1:] == ["CPU time", "peak RSS", "rate"]
    if name == "runners":
        assert names(figures) == ["sync", "async"]
    if name == "memory":
        assert [row["unit"] for row in figures] == ["GiB", "GiB"]
        assert figures[1]["ratio"] == figures[1]["value"] / figures[0]["value"]
    if name == "loop":
        parts = ["env", "policy", "replay add", "replay sample", "replay write back", "update"]
        assert names(figures) == [*parts, "overhead"]
        assert sum(row["ratio"] for row in figures) == pytest.approx(1.0)


@pytest.mark.slow
def test_runners_of_each_case_in_a_process_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    invoke(load("runners"), *SMALL["runners"].split(), "--json", str(path))
    assert names(checked(path)) == ["sync", "async"]


@pytest.mark.slow
def test_an_update_beside_rllib(tmp_path: Path) -> None:
    path, options = tmp_path / "figures.json", [*SMALL["train_step"].split(), "--no-compile"]
    invoke(load("train_step"), *options, "--against", "rllib", "--json", str(path))
    row = checked(path)[0]
    assert row["ratio"] > 0 and row["target_ratio"] and row["beside"].startswith("RLlib XS")


@pytest.mark.slow
def test_two_learners_beside_one(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = "--size 1M --obs vector --batch 2 --length 4 --rounds 1 --warmup 0".split()
    command = [sys.executable, str(FOLDER / "learners.py"), *options, "--json", str(path)]
    subprocess.run(command, check=True, timeout=600)
    one, two, reduce = checked(path)
    assert "one learner" in one["what"] and "two learners" in two["what"]
    assert reduce["what"].startswith("all-reduce of ") and two["ratio"] > 0


def test_all_writes_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, readme = load("all"), tmp_path / "README.md"
    original = (FOLDER / "README.md").read_text()
    readme.write_text(original)
    monkeypatch.setattr(module, "README", readme)
    policy = {"policy": ("policy_step.py --size 1M", "--steps 2")}
    monkeypatch.setattr(module, "COMMANDS", policy)
    invoke(module, "--quick", "--out", str(tmp_path), "--publish")
    table = (tmp_path / "table.md").read_text()
    assert "| **`policy_step.py --size 1M --steps 2`** |" in table  # as it ran
    assert "| policy step 1M image, 16 envs |" in table
    assert load("common").machine()["cpu"] in table
    published = readme.read_text()
    assert table in published
    assert published.partition(module.END)[2] == original.partition(module.END)[2]
    assert published.partition(module.BEGIN)[0] == original.partition(module.BEGIN)[0]


def test_all_runs_those_named_and_publishes_no_part_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ran = load("all"), []
    done = {"figures": []}
    monkeypatch.setattr(module, "run", lambda name, *args: ran.append(name) or done)
    invoke(module, "--only", "loop", "--out", str(tmp_path))
    assert ran == ["loop_image", "loop_vector"]
    for options, message in (
        ({"only": "polcy"}, "is in none of the names"),
        ({"only": "loop", "to_readme": True}, "replaces the whole table"),
    ):
        with pytest.raises(typer.BadParameter, match=message):
            module.main(out=tmp_path, **options)
    assert len(ran) == 2


def test_every_benchmark_is_part_of_all() -> None:
    scripts = {command.split()[0] for command, _ in load("all").COMMANDS.values()}
    benchmarks = {p.name for p in FOLDER.glob("*.py") if "typer.run(main)" in p.read_text()}
    assert scripts == benchmarks - {"all.py"}


def test_each_case_of_the_runners_takes_turns_with_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, asked, alive = load("runners"), [], []

    class Program:
        def __init__(self, build: object, case: Any) -> None:
            self.case = case
            alive.append(case)
            assert len(alive) <= 2

        def ask(self, function: object) -> float:
            asked.append(self.case.runners)
            return 10.0 * len(asked)

        def close(self) -> None:
            alive.remove(self.case)

    monkeypatch.setattr(module, "Program", Program)
    cases = [module.Case("noise", module.Observation.image, n, 1, "sync") for n in (0, 1, 2)]
    first, one, two = module.figures("noise", cases, module.measure(cases, 2, 0.0))
    assert asked == [0, 0, 0, 1, 0, 1, 0, 2, 0, 2] and not alive
    assert first.ratio is None and not first.beside and first.value == 15.0
    assert one.ratio == (40 / 30 + 60 / 50) / 2 and one.beside == "local x 1 envs 40 steps/s"
    assert two.ratio == (80 / 70 + 100 / 90) / 2


def test_ratios_of_the_replay_are_those_of_single_turns() -> None:
    module = load("replay")
    results = {key: {"ours": [1.0, 6.0, 4.0], "rllib": [2.0, 3.0, 8.0]} for key in module.LABELS}
    for key in module.ONCE:
        results[key] = {"ours": [3.0], "rllib": [6.0]}
    del results["refresh"]["rllib"]
    rows = dict(zip(module.LABELS, module.figures(results), strict=True))
    assert rows["sample"].ratio == 0.5 and rows["sample"].beside == "RLlib 3 ms"
    assert (rows["sample"].least, rows["sample"].most) == (1.0, 6.0)
    assert rows["fill"].ratio == 0.5 and rows["fill"].least is None
    assert rows["bytes"].most is None and rows["bytes"].met
    assert rows["refresh"].ratio is None


def test_a_target_bounds_the_value_or_the_ratio() -> None:
    figure = load("common").Figure
    assert figure("", 2.0, "ms").met is None
    assert figure("", 2.0, "ms", target=2.0).met and not figure("", 2.1, "ms", target=2.0).met
    slow = figure("", 1.0, "s", ratio=0.2, target_ratio=0.15)
    assert not slow.met and slow.cells()[-2:] == ("ratio <= 0.15", "no")
    assert slow._replace(higher=True).met
    assert slow._replace(ratio=None).met is None
