"""RLlib's env runner, which can also replace an async vector env that has lost a process."""

from __future__ import annotations

from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner


class DreamerEnvRunner(SingleAgentEnvRunner):
    """RLlib's env runner; see `make_env`."""

    def make_env(self) -> None:
        """Builds the vector env, also in place of one of whose processes was killed.

        RLlib closes the old one first. Closing an `AsyncVectorEnv` waits for the answer of each
        process, of those too that have answered already: after a kill it would wait for ever.
        """
        env = None if self.env is None else self.env.unwrapped
        if isinstance(env, AsyncVectorEnv) and not all(p.is_alive() for p in env.processes):
            env._state = AsyncState.DEFAULT  # there is nothing left to wait for
            env.close(terminate=True)
        super().make_env()
