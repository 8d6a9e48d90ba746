"""A Ray cluster of two nodes on this machine: who runs where, and the training ratio there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config

from rllib_dreamer.dreamer import DreamerTorch

HERE = Path(__file__).resolve().parent
ITERATIONS = 30

# In a process of its own, which has no Ray yet. The head node has no CPU for runners or learners.
CLUSTER = """
import json, logging, sys
import ray
from ray.cluster_utils import Cluster
from tiny import CountingEnv, tiny_config

def node(_):
    return ray.get_runtime_context().get_node_id()

head = {"num_cpus": 0, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
second = cluster.add_node(num_cpus=6)
cluster.wait_for_nodes()
ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
try:
    config = tiny_config(CountingEnv, training={"training_ratio": 24})
    config.env_runners(
        num_env_runners=2, num_envs_per_env_runner=2, gym_env_vectorize_mode=sys.argv[1]
    )
    config.learners(num_learners=2, num_cpus_per_learner=1)
    algo = config.build_algo()
    found = {
        "main": node(None) == second.node_id,
        "runners": [
            n == second.node_id
            for n in algo.env_runner_group.foreach_env_runner(node, local_env_runner=False)
        ],
        "learners": [n == second.node_id for n in algo._on_learners(node)],
    }
    results = [algo.train() for _ in range(int(sys.argv[2]))]
    counters = ("agent_steps", "updates")
    found["counters"] = [[r["dreamer"][name] for name in counters] for r in results]
    found["sampled"] = [r["num_env_steps_sampled_lifetime"] for r in results]
    print("RESULT", json.dumps(found))
    algo.stop()
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_runners_and_learners_on_a_second_node(mode: str) -> None:
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CLUSTER, mode, str(ITERATIONS)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "RAY_raylet_start_wait_time_s": "120"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.partition("RESULT")[2].splitlines()[0])
    assert not found["main"]
    assert found["runners"] == found["learners"] == [True, True]
    assert found["sampled"] == [steps for steps, _ in found["counters"]]
    (began, first), *rest = [pair for pair in found["counters"] if pair[1]]
    assert first == 1 and len(rest) > 5
    for steps, updates in rest:  # a batch has 4 x 8 steps
        assert updates == 1 + (steps - began) * 24 // 32


@pytest.mark.parametrize(("learners", "gpus"), [(0, 0.5), (1, 0.5), (4, 2.0)])
def test_a_learner_may_have_a_share_of_a_gpu(learners: int, gpus: float) -> None:
    config = tiny_config().learners(num_learners=learners, num_gpus_per_learner=0.5)
    config.validate()
    assert config.num_gpus_per_learner == 0.5
    request = DreamerTorch.default_resource_request(config)
    assert request.required_resources["GPU"] == gpus
