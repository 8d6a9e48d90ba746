from __future__ import annotations

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
    ],
)
def test_success_of(infos: list[dict[str, object]], expected: bool | None) -> None:
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
