"""Acting with what was learned: no environment is built and Ray is not started."""

from __future__ import annotations

from rllib_dreamer.policy.policy import DreamerPolicy

__all__ = ["DreamerPolicy"]
