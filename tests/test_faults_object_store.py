"""Too little room in Ray's object store for what is in it: Ray spills it, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, which has no Ray yet. Every round of samples and every set of weights
# needs room that is taken, so other objects must go to the disk first.
PRESSED = """
import json, logging, pathlib, sys
import numpy as np, ray
from gymnasium import spaces
from tiny import CONTINUOUS, RandomEnv, tiny_config

MB = 1 << 20
ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=80 * MB,
         object_spilling_directory=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
taken = [ray.put(np.full(10 * MB, i, np.uint8)) for i in range(20)]
picture = spaces.Box(0, 255, (96, 96, 3), np.uint8)
config = tiny_config(RandomEnv, observation_space=picture, action_space=CONTINUOUS, length=50)
config.training(training_ratio=16)
config.env_runners(num_env_runners=2, num_envs_per_env_runner=2, rollout_fragment_length=25)
algo = config.build_algo()
counters = []
while len(counters) < 8:
    taken.append(ray.put(np.full(10 * MB, len(taken), np.uint8)))
    result = algo.train()
    counters.append([
        result["dreamer"]["agent_steps"],
        result["num_env_steps_sampled_lifetime"],
        result["dreamer"]["updates"],
        algo.env_runner_group.num_healthy_remote_workers(),
    ])
spilled = sum(f.stat().st_size for f in pathlib.Path(sys.argv[1]).rglob("*") if f.is_file())
whole = all((ray.get(x) == i).all() for i, x in enumerate(taken))
print("RESULT", json.dumps({"counters": counters, "spilled": spilled, "whole": whole}))
algo.stop()
"""


@pytest.mark.slow
def test_a_full_object_store_costs_time_only(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRESSED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.partition("RESULT")[2].splitlines()[0])
    assert found["whole"]
    assert found["spilled"] > 100 << 20
    began = None
    for round_, (steps, sampled, updates, healthy) in enumerate(found["counters"], 1):
        assert steps == sampled == 100 * round_
        assert healthy == 2
        if updates:
            began = began or steps
            assert updates == 1 + (steps - began) * 16 // 32
    assert began == 100
