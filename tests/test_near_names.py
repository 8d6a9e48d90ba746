"""What was meant by a name that was not found."""

from __future__ import annotations

from rllib_dreamer.near_names import did_you_mean, nearest


def test_did_you_mean() -> None:
    assert did_you_mean("walkr", ["walker", "hopper"]) == " (did you mean walker?)"
    assert (
        did_you_mean("WALKR", ["Walker", "Walker", "Talker"], count=1) == " (did you mean Walker?)"
    )
    assert did_you_mean("walkr", ["walker"], cutoff=0.95) == did_you_mean("zzz", ["walker"]) == ""


def test_nearest() -> None:
    assert nearest("waker-walk", ["x", "walker-walk"]) == "did you mean 'walker-walk'?"
    assert nearest("qqqq", ["def", "abc"]) == "known are 'abc', 'def'"
    assert nearest("qqqq", "abcdef", count=2) == "known are 'a', 'b', ..."
