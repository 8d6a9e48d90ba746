from __future__ import annotations

import math

import pytest

from rllib_dreamer.episode_averages import STATISTICS, EpisodeAverages


def statistics(mean: float, spread: float = 1.0) -> dict[str, float]:
    """As of episodes with returns and lengths of `mean` and that much more and less."""
    ends = {"mean": mean, "min": mean - spread, "max": mean + spread}
    return {name: ends[name.rsplit("_", 1)[1]] for name in STATISTICS}


def test_statistics_are_of_the_latest_episodes() -> None:
    averages = EpisodeAverages(window=3)
    means, least, greatest = [], [], []
    for ended, mean in ((2, 10.0), (0, math.nan), (1, 40.0), (1, 50.0), (3, 60.0)):
        latest = averages.add(ended, statistics(mean))
        means.append(latest["episode_return_mean"])
        least.append(latest["episode_return_min"])
        greatest.append(latest["episode_return_max"])
    assert means == [10.0, 10.0, 20.0, 27.5, 60.0]
    assert least == [9.0, 9.0, 9.0, 9.0, 59.0]
    assert greatest == [11.0, 11.0, 41.0, 51.0, 61.0]


def test_before_the_first_episode_all_are_nan() -> None:
    latest = EpisodeAverages(window=3).add(0, {"episode_return_mean": 1.0})
    assert tuple(latest) == STATISTICS
    assert all(math.isnan(value) for value in latest.values())


def test_what_is_missing_is_left_out() -> None:
    averages = EpisodeAverages(window=5)
    averages.add(1, {"episode_return_mean": 1.0, "episode_return_max": 3.0, "other": "text"})
    latest = averages.add(1, {"episode_return_mean": 2.0})
    assert (latest["episode_return_mean"], latest["episode_return_max"]) == (1.5, 3.0)
    assert math.isnan(latest["episode_return_min"])
    latest = averages.add(1, {"episode_return_mean": math.nan, "episode_return_max": 4.0})
    assert (latest["episode_return_mean"], latest["episode_return_max"]) == (1.5, 4.0)


@pytest.mark.parametrize("before", [1, 2, 4])
def test_a_state_goes_on(before: int) -> None:
    given = [(1, 1.0), (0, 0.0), (2, 5.0), (1, 2.0), (2, 8.0)]
    unbroken, broken, resumed = (EpisodeAverages(window=3) for _ in range(3))
    expected = [unbroken.add(n, statistics(mean)) for n, mean in given]
    for n, mean in given[:before]:
        broken.add(n, statistics(mean))
    resumed.set_state(broken.get_state())
    assert [resumed.add(n, statistics(mean)) for n, mean in given[before:]] == expected[before:]
