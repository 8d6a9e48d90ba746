"""Tests of rllib_dreamer.evaluation.statistics."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from rllib_dreamer.evaluation import statistics


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 20, 41])
def test_iqm_equals_the_trimmed_mean_of_scipy(count: int) -> None:
    scores = np.random.default_rng(count).normal(100.0, 50.0, count)
    expected = stats.trim_mean(scores, 0.25)
    assert statistics.interquartile_mean(scores) == pytest.approx(expected)


def test_iqm_ignores_outliers_and_keeps_leading_axes() -> None:
    scores = np.array([[-1e9, 1.0, 2.0, 1e9], [0.0, 0.0, 0.0, 8.0]])
    np.testing.assert_allclose(statistics.interquartile_mean(scores), [1.5, 0.0])


def test_summary_by_hand() -> None:
    summary = statistics.summarize([4.0, 1.0, 3.0, 2.0, 10.0])
    assert summary.n == 5
    assert summary.mean == pytest.approx(4.0)
    assert summary.std == pytest.approx(np.sqrt(10.0))  # of the population, not of a sample
    assert (summary.median, summary.min, summary.max) == (3.0, 1.0, 10.0)
    assert summary.iqm == pytest.approx(3.0)
    assert summary.iqm_low <= summary.iqm <= summary.iqm_high


def test_bootstrap_is_seeded_and_independent_of_block_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = [np.random.default_rng(0).normal(size=30)]
    first = statistics.stratified_bootstrap(scores, resamples=500, seed=3)
    assert statistics.stratified_bootstrap(scores, resamples=500, seed=3) == first
    assert statistics.stratified_bootstrap(scores, resamples=500, seed=4) != first
    monkeypatch.setattr(statistics, "_RESAMPLES_PER_BLOCK", 300)
    blocked = statistics.stratified_bootstrap(scores, resamples=500, seed=3)
    assert blocked == pytest.approx(first)


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = statistics.stratified_bootstrap(
            [rng.normal(size=40)], statistics.mean, resamples=400, seed=trial
        )
        covered += low <= 0.0 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_agrees_with_scipy() -> None:
    scores = np.random.default_rng(2).gamma(2.0, 50.0, 25)
    ours = statistics.stratified_bootstrap([scores], statistics.mean, resamples=20_000)
    other = stats.bootstrap(
        (scores,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    np.testing.assert_allclose(ours, other, rtol=0.01)


def test_strata_keep_their_weight_in_every_resample() -> None:
    """Two tasks without spread: within-stratum resampling leaves nothing uncertain."""
    easy, hard = np.zeros(10), np.full(10, 100.0)
    assert statistics.stratified_bootstrap([easy, hard]) == (50.0, 50.0)
    low, high = statistics.stratified_bootstrap([np.concatenate([easy, hard])])
    assert low < 40.0 < 60.0 < high


def test_episode_summary_becomes_json() -> None:
    summary = statistics.summarize_episodes([1.0, 2.0], [10, 20], resamples=10)
    read = json.loads(json.dumps(summary.as_dict()))
    assert read["returns"]["mean"] == 1.5
    assert read["lengths"]["max"] == 20.0


@pytest.mark.parametrize(
    ("returns", "expected"),
    [([5.0], (0, 0, 0)), ([3.0, 1.0, 2.0], (0, 2, 1)), ([4.0, 1.0, 3.0, 2.0], (0, 3, 1))],
)
def test_representative_episodes(returns: list[float], expected: tuple[int, int, int]) -> None:
    assert statistics.representative_episodes(returns) == expected


def test_errors_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"scores: got shape \(0,\)"):
        statistics.summarize([])
    with pytest.raises(ValueError, match="scores: got 1 NaN or infinite of 2"):
        statistics.summarize([1.0, np.nan])
    with pytest.raises(ValueError, match=r"lengths: got shape \(1,\)"):
        statistics.summarize_episodes([1.0, 2.0], [3])
    with pytest.raises(ValueError, match="resamples: got 0"):
        statistics.summarize([1.0], resamples=0)
    with pytest.raises(ValueError, match="strata: got none"):
        statistics.stratified_bootstrap([])
    with pytest.raises(ValueError, match=r"returns: got shape \(0,\)"):
        statistics.representative_episodes([])
