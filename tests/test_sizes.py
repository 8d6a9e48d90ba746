"""Tests of rllib_dreamer.model.sizes."""

from __future__ import annotations

import pytest
import torch

from rllib_dreamer.model.agent import build_agent
from rllib_dreamer.model.sizes import (
    ALIASES,
    SIZES,
    ActionSpec,
    LossConfig,
    ObsSpec,
    model_config,
)

IMAGE, VECTOR = ObsSpec("image", (64, 64, 3)), ObsSpec("vector", (24,))


@pytest.mark.parametrize(
    ("size", "key", "spec", "official"),
    [
        ("1M", "image", IMAGE, 686_846),
        ("12M", "image", IMAGE, 10_494_158),
        ("25M", "image", IMAGE, 23_489_326),
        ("50M", "image", IMAGE, 41_650_062),
        ("100M", "image", IMAGE, 93_468_238),
        ("200M", "image", IMAGE, 165_948_686),
        ("400M", "image", IMAGE, 372_896_398),
        ("1M", "vector", VECTOR, 640_867),
        ("12M", "vector", VECTOR, 9_738_019),
        ("3M", "image", IMAGE, 2_664_558),  # ours: there is no official one
    ],
)
def test_parameter_counts_are_the_official_ones(
    size: str, key: str, spec: ObsSpec, official: int
) -> None:
    """With six continuous actions; the slow critic does not count."""
    with torch.device("meta"):
        actions = {"action": ActionSpec("continuous", 6)}
        agent = build_agent({key: spec}, actions, model_config(size), LossConfig())
    assert sum(p.numel() for p in agent.parameters() if p.requires_grad) == official
    assert not any(p.requires_grad for p in agent.behavior.slow_critic.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_every_size_follows_from_its_units(name: str) -> None:
    size = SIZES[name]
    assert size.deter == 8 * size.units and size.hidden == size.units
    assert size.classes == size.depth == size.units // 16


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_and_case(alias: str) -> None:
    assert model_config(alias.lower()) == model_config(ALIASES[alias])


def test_overrides() -> None:
    config = model_config("1m", stoch=8, blocks=4)
    assert (config.stoch, config.blocks, config.deter) == (8, 4, 512)
    assert config.feat == 512 + 8 * 4


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="model_size='7M' is not known: choose one of 1M, 3M, 12M"):
        model_config("7M")


def test_widths_and_constants() -> None:
    assert ActionSpec("continuous", 3).width == 3
    assert ActionSpec("discrete", 2, 5).width == 10
    assert LossConfig().discount == pytest.approx(332 / 333)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bins": 254}, "bins=254 must be an odd number >= 3"),
        ({"bins": 1}, "bins=1 must be an odd number >= 3"),
        ({"classes": 257}, "classes=257 must be from 2 to 256"),
        ({"classes": 1}, "classes=1 must be from 2 to 256"),
        ({"deter": 100}, "deter=100 must be a multiple of blocks=8"),
        ({"blocks": 0}, "deter=512 must be a multiple of blocks=0"),
        ({"decoder_blocks": 3}, "deter=512 must be a multiple of decoder_blocks=3"),
        ({"units": 0}, "units=0 must be a width >= 1"),
        ({"actor_layers": 0}, "actor_layers=0 must be a number of layers >= 1"),
        ({"mults": ()}, r"mults=\(\) must be multiples of `depth`"),
        ({"mults": (2, 0)}, r"mults=\(2, 0\) must be multiples of `depth`"),
        ({"unimix": 1.5}, "unimix=1.5 must be a share"),
        ({"actor_unimix": -0.1}, "actor_unimix=-0.1 must be a share"),
        ({"min_std": 2.0}, "min_std=2.0 and max_std=1.0: 0 < min_std <= max_std"),
    ],
)
def test_numbers_out_of_range_are_refused(overrides: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config("1M", **overrides)
