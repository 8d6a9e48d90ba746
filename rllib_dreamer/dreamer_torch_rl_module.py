"""RLModule: the agent behind RLlib's interface for acting and training."""

from __future__ import annotations

from typing import Any

from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.inference_only_api import InferenceOnlyAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor

from rllib_dreamer.dreamer_catalog import DreamerCatalog
from rllib_dreamer.model.agent import ActState, Agent
from rllib_dreamer.model.fuse import fusing
from rllib_dreamer.spaces import canonical, flatten, restore, unflatten


class DreamerTorchRLModule(TorchRLModule, InferenceOnlyAPI):
    """Acts with the posterior of the world model; trains by one pass to every loss.

    The recurrent state is that of `Agent.act`: deter (D,), stoch (S,) as class indices and the
    encoded previous action (A,). RLlib stores STATE_OUT with every step of an episode, which is how
    the latents get into the replay.
    """

    catalog: DreamerCatalog
    agent: Agent

    def setup(self) -> None:
        """Builds the agent, without the parts that only learning needs on an EnvRunner."""
        if self.catalog is None:
            raise self._catalog_ctor_error or ValueError(
                "DreamerTorchRLModule needs a catalog_class: set it in the RLModuleSpec, for "
                "example to DreamerCatalog."
            )
        self.agent = self.catalog.build_agent()
        self.agent.fuse = self.catalog.fuse
        if self.inference_only:
            self.agent.keep_acting_parts()

    def get_non_inference_attributes(self) -> list[str]:
        """What EnvRunners neither hold nor receive."""
        return [f"agent.{name}" for name in Agent.LEARNING_PARTS]

    def get_initial_state(self) -> dict[str, Tensor]:
        """The state before an episode's first observation, without a batch axis."""
        return {key: x[0] for key, x in self.agent.initial_state(1)._asdict().items()}

    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._act(batch, explore=False)

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Samples actions; uniform ones while t, the EnvRunner's count, is within the first steps.

        RLlib brings that count up to date after each iteration, so the last one is finished.
        """
        t = kwargs.get("t")
        random = t is not None and t < self.catalog.initial_random_steps
        return self._act(batch, explore=True, random=random)

    def _act(self, batch: dict[str, Any], explore: bool, random: bool = False) -> dict[str, Any]:
        """Observations (n, T=1, ...) and STATE_IN -> actions (n, 1, ...) and STATE_OUT."""
        leaves = flatten(batch[Columns.OBS], self.observation_space)
        obs = {
            key: canonical(leaves[key][:, 0], space)
            for key, space in self.catalog.observation_leaves.items()
        }
        state = ActState(**batch[Columns.STATE_IN])
        with fusing(self.agent.fuse):
            actions, state = self.agent.act(obs, state, explore, random)
        restored = {
            key: restore(actions[key], space).unsqueeze(1)
            for key, space in self.catalog.action_leaves.items()
        }
        return {
            Columns.ACTIONS: unflatten(restored, self.action_space, root="action"),
            Columns.STATE_OUT: state._asdict(),
        }

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """One pass over a replay batch; see `Agent.forward`."""
        return self.agent(self.model_batch(batch))._asdict()

    def model_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as the replay gives it, with its leaves in the model's form."""
        leaves = {f"obs/{key}": space for key, space in self.catalog.observation_leaves.items()}
        leaves |= {f"action/{key}": space for key, space in self.catalog.action_leaves.items()}
        return {k: canonical(x, leaves[k]) if k in leaves else x for k, x in batch.items()}
