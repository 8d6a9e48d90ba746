from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rllib_dreamer.envs.success import last_info, success_of


@pytest.mark.parametrize(
    ("infos", "expected"),
    [
        ([], None),
        ([{}, {"other": True}], None),
        ([{}, {"success": False}, {}], False),
        ([{"success": True}, {"success": False}], True),
        ([{"is_success": 0.0}, {"is_success": 1.0}], True),
        ([{"success": np.array([True, False])}, {"success": np.array([False, True])}], False),
        ([{"success": np.array([True, False])}, {"success": np.array([True, True])}], True),
        ([{"is_success": [1.0, 0.0]}], False),
        ([{"success": np.array([])}], False),
        ([{"success": np.nan}], True),
        ([{"success": None}], False),
        ([{"success": "yes"}], True),
    ],
)
def test_success_of(infos: list[dict[str, Any]], expected: bool | None) -> None:
    assert success_of(infos) is expected


@pytest.mark.parametrize(
    ("infos", "expected"),
    [
        ([{"lives": 3}], {"lives": 3}),
        ([{"lives": 3}, {"lives": 2}], {"lives": 2}),
        ([{"success": True}, {"success": False, "lives": 2}], {"success": True, "lives": 2}),
        ([{"is_success": 0.0}, {"is_success": 1.0}, {}], {"is_success": 1.0}),
        ([{"success": False}, {"success": False}], {"success": False}),
    ],
)
def test_last_info_of_a_repeat_knows_a_success_at_any_step(
    infos: list[dict[str, object]], expected: dict[str, object]
) -> None:
    assert last_info(infos) == expected


def test_last_info_of_a_repeat_knows_a_success_of_both_arms() -> None:
    told = [np.array(arms) for arms in ([True, False], [True, True], [False, True])]
    assert last_info([{"success": arms} for arms in told])["success"] is told[1]
    assert last_info([{"success": arms} for arms in told[:1]])["success"] is told[0]
