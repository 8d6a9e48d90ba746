from __future__ import annotations

from fractions import Fraction

import pytest

from rllib_dreamer.training_ratio import TrainingRatio


@pytest.mark.parametrize("ratio", [0.1, 0.7, 3, 32, 48, 100, 256, 1024.0, 5000])
@pytest.mark.parametrize("envs", [1, 3, 16])
def test_ratio_is_held_exactly_at_every_step(ratio: float, envs: int) -> None:
    counter, begin, batch = TrainingRatio(ratio, 64), 100, 64
    updates = counter.updates(begin)
    assert updates == 1
    for step in range(begin + envs, begin + 20_000, envs):
        updates += counter.updates(step)
        assert updates == 1 + int((step - begin) * Fraction(str(ratio)) / batch)


def test_the_steps_before_the_first_update_ask_for_none() -> None:
    assert TrainingRatio(1024, 1024).updates(5000) == 1


def test_a_restored_counter_goes_on_without_burst_or_gap() -> None:
    whole, first = TrainingRatio(7, 64), TrainingRatio(7, 64)
    expected = [whole.updates(n) for n in range(200)]
    got = [first.updates(n) for n in range(77)]
    second = TrainingRatio(7, 64)
    second.set_state(first.get_state())
    got += [second.updates(n) for n in range(77, 200)]
    assert got == expected


def test_a_state_from_before_the_first_update() -> None:
    counter = TrainingRatio(7, 64)
    counter.set_state(TrainingRatio(7, 64).get_state())
    assert counter.updates(50) == 1


def test_steps_taken_before_a_restart_ask_for_no_updates() -> None:
    counter = TrainingRatio(64, 64)
    assert [counter.updates(n) for n in (10, 12)] == [1, 2]
    counter.restart()
    assert [counter.updates(n) for n in (100, 103)] == [1, 3]


def test_a_restored_counter_of_a_higher_ratio_gives_no_burst() -> None:
    slow, fast = TrainingRatio(1, 64), TrainingRatio(64, 64)
    assert [slow.updates(n) for n in (0, 63)] == [1, 0]
    fast.set_state(slow.get_state())
    assert [fast.updates(n) for n in (64, 65)] == [1, 1]
