"""The parts of the agent that may have their own learning rates, and how a config holds these."""

from __future__ import annotations

from typing import Any

PARTS = ("world_model", "actor", "critic")


class PartRate:
    """The learning rate of a part, as a field of a config: where none is set it reads as `lr`.

    A value that is set, or None, lies in the config's dict under the field's own name.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, config: Any, owner: type) -> Any:
        if config is None:
            return self
        own = config.__dict__[self._name]
        return config.lr if own is None else own

    def __set__(self, config: Any, value: Any) -> None:
        config.__dict__[self._name] = value
