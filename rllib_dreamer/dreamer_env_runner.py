"""RLlib's env runner, which also copes with an async vector env that has lost a process."""

from __future__ import annotations

from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner


class DreamerEnvRunner(SingleAgentEnvRunner):
    """RLlib's env runner, but for the closing of an env one of whose processes was killed.

    Closing an `AsyncVectorEnv` waits for the answer of each process, of those too that have
    answered already: after a kill it would wait for ever.
    """

    def make_env(self) -> None:
        """Builds the vector env, in place of an earlier one if there is one."""
        self._end_broken_env()
        super().make_env()

    def stop(self) -> None:
        """Closes the vector env."""
        self._end_broken_env()
        super().stop()

    def _end_broken_env(self) -> None:
        env = None if self.env is None else self.env.unwrapped
        if not isinstance(env, AsyncVectorEnv) or env.closed:
            return
        waits = env._state != AsyncState.DEFAULT  # a process that was just killed may seem alive
        if waits or not all(process.is_alive() for process in env.processes):
            env._state = AsyncState.DEFAULT  # no answer is needed any more
            env.close(terminate=True)
