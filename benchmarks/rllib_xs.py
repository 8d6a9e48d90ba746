"""One update of RLlib's own DreamerV3, size XS, as a program to be timed."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.dreamerv3 import DreamerV3Config
from ray.rllib.core import DEFAULT_MODULE_ID, Columns
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from updates import ACTION, FRAME, Case, set_up_numbers


class RLlibUpdate:
    """One update at every call, in float32, on images; only batch, length and threads are read.

    It flushes denormal numbers as ours does, which makes it faster. Memory is as RLlib leaves it:
    to keep it, as our learner does, is part of what is compared.
    """

    def __init__(self, case: Case) -> None:
        set_up_numbers(case.threads)
        self._shape = case.batch, case.length
        self._learner = rllib_learner(*self._shape)
        self._columns = synthetic_columns(*self._shape)
        module = self._learner.module[DEFAULT_MODULE_ID].unwrapped()
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def __call__(self) -> None:
        """Does it."""
        tensors = {key: torch.from_numpy(x) for key, x in self._columns.items()}
        steps = self._shape[0] * self._shape[1]
        samples = MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(tensors)}, env_steps=steps)
        self._learner.update(training_data=TrainingData(batch=samples))


def rllib_learner(batch: int, length: int) -> Any:
    """Builds the learner for frames and continuous actions."""
    obs_space = gym.spaces.Box(-1.0, 1.0, FRAME, np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)
    config = (
        DreamerV3Config()
        .environment(observation_space=obs_space, action_space=action_space)
        .training(model_size="XS", batch_size_B=batch, batch_length_T=length, horizon_H=15)
        .learners(num_learners=0, num_gpus_per_learner=0)
    )
    spec = config.get_default_rl_module_spec()
    spec.observation_space, spec.action_space = obs_space, action_space
    spec.model_config = config.model_config | {"model_size": "XS"}
    learner = config.get_default_learner_class()(config=config, module_spec=spec)
    learner.build()
    return learner


def synthetic_columns(batch: int, length: int) -> dict[str, np.ndarray]:
    """A batch of noise, without episode ends."""
    shape, rng = (batch, length), np.random.default_rng(0)
    columns = {
        Columns.OBS: rng.uniform(-1, 1, (*shape, *FRAME)),
        Columns.ACTIONS: rng.uniform(-1, 1, (*shape, ACTION)),
        Columns.REWARDS: rng.uniform(0, 1, shape),
        "is_first": np.zeros(shape),
        "is_last": np.zeros(shape),
        "is_terminated": np.zeros(shape),
    }
    return {key: x.astype(np.float32) for key, x in columns.items()}
