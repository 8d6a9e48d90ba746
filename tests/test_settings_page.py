"""docs/settings.md has every keyword of `DreamerConfig.training`, with its default and range."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

import pytest
from test_packaging import ROOT

from rllib_dreamer.dreamer_config import DreamerConfig
from rllib_dreamer.model.sizes import SIZES, LossConfig
from rllib_dreamer.setting_ranges import RANGES

PAGE = (ROOT / "docs" / "settings.md").read_text()
OF_RLLIB = {"lr", "gamma"}  # keywords of `training` that it hands on


class Row(NamedTuple):
    """A row of a table, without backticks; the section is its heading."""

    section: str
    name: str
    default: str
    allowed: str
    meaning: str


def rows() -> list[Row]:
    found = []
    for section in PAGE.split("\n## ")[1:]:
        for line in re.findall(r"^\| `.*$", section, re.M):
            cells = [cell.strip().replace("`", "") for cell in line.split("|")[1:-1]]
            found.append(Row(section.partition("\n")[0], *cells))
    return found


ROWS = {row.name: row for row in rows()}


def in_words(allowed: str) -> str:
    """The words of an error message as the page has them."""
    if allowed.startswith("one of"):
        return ", ".join(f'"{choice}"' for choice in re.findall(r"'(\w+)'", allowed))
    return allowed.partition(", the paper")[0].removeprefix("a ")


def test_the_page_has_every_keyword_once() -> None:
    names = {
        name
        for name, parameter in inspect.signature(DreamerConfig.training).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    shown = {row.name for row in ROWS.values() if not row.section.startswith(("RLlib", "Repor"))}
    assert len(rows()) == len(ROWS)
    assert shown == names | OF_RLLIB
    own = inspect.signature(DreamerConfig.reporting).parameters.keys() - {"self", "kwargs"}
    assert {row.name for row in ROWS.values() if row.section == "Reporting"} == own


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_page_has_the_default_and_the_range(row: Row) -> None:
    settings = vars(DreamerConfig())
    assert (row.name in settings) == bool(row.default)
    if row.default:
        assert eval(row.default) == settings[row.name]
    if row.name in RANGES:
        assert row.allowed == in_words(RANGES[row.name][0])


def test_the_page_has_the_sizes_and_the_weights_of_the_losses() -> None:
    assert re.findall(r'"(\w+)"', ROWS["model_size"].allowed) == list(SIZES)
    of_one, *others = ROWS["loss_scales"].meaning.partition(": ")[2].split(" have 1, ")
    scales = dict.fromkeys(of_one.split(", "), 1.0)
    scales |= {name: float(scale) for name, scale in re.findall(r"(\w+) ([\d.]+)", others[0])}
    assert scales == LossConfig().scales


def test_the_defaults_of_rllib_are_others() -> None:
    """A setting that RLlib has by default as we do needs no row."""
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    theirs = vars(AlgorithmConfig())
    others = {row.name for row in ROWS.values() if row.section.startswith("RLlib")}
    assert others <= theirs.keys()
    assert [name for name in others if eval(ROWS[name].default) == theirs[name]] == []
