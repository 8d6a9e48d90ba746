from __future__ import annotations

import pytest

from rllib_dreamer.envs.success import success_of


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
