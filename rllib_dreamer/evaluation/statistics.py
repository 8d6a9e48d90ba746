"""Statistics of episode returns.

The interquartile mean (IQM) and the stratified bootstrap follow Agarwal et al. 2021, "Deep
Reinforcement Learning at the Edge of the Statistical Precipice": the IQM drops the lowest and the
highest quarter of all scores, and the bootstrap resamples within each stratum (a task, or a
training run), so that a resample never changes how often a stratum counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]

CONFIDENCE = 0.95
"""Probability mass of every interval."""

_RESAMPLES_PER_BLOCK = 2_000_000  # drawn scores held at once: 16 MB


class Interval(NamedTuple):
    """A confidence interval, in the unit of the scores."""

    low: float
    high: float


class Summary(NamedTuple):
    """What a set of `n` scores looks like, in the unit of the scores.

    `std` is that of the population (divided by n), as in most published tables of returns.
    `iqm_low` and `iqm_high` bound the IQM's bootstrap interval.
    """

    n: int
    mean: float
    std: float
    median: float
    min: float
    max: float
    iqm: float
    iqm_low: float
    iqm_high: float

    @property
    def decimals(self) -> int:
        """Decimal places to show it with, if it is of returns."""
        return decimals([self.min, self.max])


class EpisodeSummary(NamedTuple):
    """Summaries of a set of episodes: returns (reward units) and lengths (agent steps)."""

    returns: Summary
    lengths: Summary

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Returns nested plain dicts, ready for JSON."""
        return {"returns": self.returns._asdict(), "lengths": self.lengths._asdict()}


class RepresentativeEpisodes(NamedTuple):
    """Indices of three episodes that are worth a video."""

    best: int
    median: int
    worst: int


def mean(scores: ArrayLike) -> NDArray[np.float64]:
    """Mean over the last axis, (..., N) -> (...)."""
    return np.asarray(np.asarray(scores, np.float64).mean(-1))


def interquartile_mean(scores: ArrayLike) -> NDArray[np.float64]:
    """Mean of the middle half of the scores.

    IQM = mean of the sorted scores without the floor(N / 4) lowest and floor(N / 4) highest
    (Agarwal et al. 2021, section 4.3).

    Args:
        scores: (..., N) scores, N >= 1.

    Returns:
        (...) the IQM over the last axis.
    """
    ordered = np.sort(np.asarray(scores, np.float64), axis=-1)
    cut = ordered.shape[-1] // 4
    return mean(ordered[..., cut : ordered.shape[-1] - cut])


def stratified_bootstrap(
    strata: list[NDArray[np.float64]],
    statistic: Statistic = interquartile_mean,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic, resampled within each stratum.

    Args:
        strata: one array of scores (N_s,) per task or run; lengths may differ.
        statistic: (..., N) -> (...), applied to all strata joined.
        resamples: number of bootstrap resamples, at least 1.
        seed: the same seed gives the same interval.

    Returns:
        The interval, in the unit of the scores.

    Raises:
        ValueError: if `strata` is empty, a score is not finite or `resamples` is out of range.
    """
    if not strata:
        raise ValueError("strata: got none; give at least one array of scores.")
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}; must be at least 1, e.g. 10000.")
    checked = [_finite_scores(scores, "strata") for scores in strata]
    rng = np.random.default_rng(seed)
    block = max(1, _RESAMPLES_PER_BLOCK // sum(scores.size for scores in checked))
    values: list[NDArray[np.float64]] = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = [rng.choice(scores, (size, scores.size)) for scores in checked]
        values.append(statistic(np.concatenate(drawn, axis=-1)))  # (size, N) -> (size,)
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(np.concatenate(values), [tail, 1.0 - tail])
    return Interval(float(low), float(high))


def summarize(scores: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> Summary:
    """Summarizes scores, with a bootstrap interval of their IQM.

    Args:
        scores: (N,) finite scores, N >= 1.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        The summary.

    Raises:
        ValueError: if `scores` is empty or not finite.
    """
    values = _finite_scores(scores, "scores")
    low, high = stratified_bootstrap([values], resamples=resamples, seed=seed)
    return Summary(
        n=values.size,
        mean=float(values.mean()),
        std=float(values.std()),
        median=float(np.median(values)),
        min=float(values.min()),
        max=float(values.max()),
        iqm=float(interquartile_mean(values)),
        iqm_low=low,
        iqm_high=high,
    )


def summarize_episodes(
    returns: ArrayLike,
    lengths: ArrayLike,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> EpisodeSummary:
    """Summarizes episodes by return and by length.

    Args:
        returns: (N,) undiscounted return of each episode.
        lengths: (N,) length of each episode in agent steps.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        Both summaries.

    Raises:
        ValueError: if the arrays are empty, not finite or differ in length.
    """
    if np.shape(returns) != np.shape(lengths):
        raise ValueError(
            f"lengths: got shape {np.shape(lengths)}; must equal the shape of returns, "
            f"{np.shape(returns)}: give one return and one length per episode."
        )
    return EpisodeSummary(
        summarize(returns, resamples=resamples, seed=seed),
        summarize(lengths, resamples=resamples, seed=seed),
    )


def decimals(returns: ArrayLike) -> int:
    """Decimal places to show returns with: 3 where none reaches 10, as with rewards of 0 and 1."""
    return 1 if np.max(np.abs(returns)) >= 10 else 3


def representative_episodes(returns: ArrayLike) -> RepresentativeEpisodes:
    """Finds the best, the median and the worst episode.

    With an even number of episodes the lower one of the middle pair counts as the median, so it
    is always an episode that took place. Among ties the worst is the first and the best the last.

    Args:
        returns: (N,) finite returns, N >= 1.

    Returns:
        Indices into `returns`.

    Raises:
        ValueError: if `returns` is empty or not finite.
    """
    order = np.argsort(_finite_scores(returns, "returns"), kind="stable")
    return RepresentativeEpisodes(
        best=int(order[-1]), median=int(order[(order.size - 1) // 2]), worst=int(order[0])
    )


def _finite_scores(scores: ArrayLike, field: str) -> NDArray[np.float64]:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"{field}: got shape {values.shape}; must be a non-empty flat list of scores, "
            "one per episode: run at least one episode to its end."
        )
    if not np.isfinite(values).all():
        wrong = int(np.count_nonzero(~np.isfinite(values)))
        raise ValueError(
            f"{field}: got {wrong} NaN or infinite of {values.size}; all must be finite: "
            "look for the environment that returns such a reward."
        )
    return values
