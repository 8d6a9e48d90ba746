"""Tests of the prefetching thread."""

from __future__ import annotations

import numpy as np
import pytest
from replay_episodes import D, Env, S, T, assert_equal, make

from rllib_dreamer.replay_prefetch import Prefetcher


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetched_batches_carry_latents_of_the_update_before(depth: int) -> None:
    replay = make(capacity=100, batch_size=8)
    replay.add([Env().run(40)])
    prefetcher = Prefetcher(replay, depth)
    latest = np.full(40, np.nan)
    for update in range(20):
        batch = prefetcher.next()
        known = ~np.isnan(latest[batch["index"]])
        np.testing.assert_array_equal(batch["deter"][known][:, 0], latest[batch["index"]][known])
        index = batch["index"][:, 1:]
        latest[index] = update
        replay.update_latents(
            index, np.full((*index.shape, D), update), np.zeros((*index.shape, S))
        )
    assert not np.isnan(latest[1:]).all()
    prefetcher.close()


def test_prefetcher_gives_the_batches_that_sampling_would() -> None:
    replays = [make(seed=1), make(seed=1)]
    for replay in replays:
        replay.add([Env().run(50)])
    prefetcher = Prefetcher(replays[0], 2)
    for _ in range(5):
        assert_equal(prefetcher.next(), replays[1].sample())
    prefetcher.close()
    assert prefetcher.next()["index"].shape == (4, T + 1)
    prefetcher.close()


def test_prefetcher_hands_errors_on_and_refuses_negative_depth() -> None:
    replay = make()
    with pytest.raises(ValueError, match="sampling needs"):
        Prefetcher(replay, 1).next()
    with pytest.raises(ValueError, match="depth is -1, allowed is >= 0"):
        Prefetcher(replay, -1)
