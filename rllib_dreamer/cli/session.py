"""Ray for one run: quiet unless asked, sized to the machine."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rllib_dreamer.cli.errors import CommandError

#: Tune's own screen off, and its Ctrl-C handler, which ends trials without a checkpoint.
_TUNE_SETTINGS = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
_QUIET_SETTINGS = {"TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}
_LOGGERS = ("ray", "ray.tune", "ray.rllib", "ray.train")


@contextmanager
def ray_session(address: str | None, verbose: bool, modules: Path | None = None) -> Iterator[bool]:
    """Starts or joins Ray, and leaves it afterwards unless it ran before.

    Args:
        address: A running cluster; None starts Ray on this machine (or follows RAY_ADDRESS).
        verbose: Show the logs of Ray and of all workers.
        modules: Folder whose modules the workers can import too.

    Yields:
        Whether Ray is that of this machine alone, so that what it has now is all it will have.

    Raises:
        CommandError: If there is no cluster at the address, or it has a scheme such as http://.
    """
    prepare(verbose)
    given = "RAY_ADDRESS" if address is None else "--ray-address"
    address = address or os.environ.get("RAY_ADDRESS")
    local = not address
    if "://" in (address or ""):
        raise CommandError(
            f"{given} {address}: must be HOST:PORT or auto; from outside the cluster submit the "
            "command as a job: ray job submit --address http://HOST:8265 -- rllib train ..."
        )
    if ray.is_initialized():
        yield local
        return
    # Without an address Ray joins any cluster that it finds on the machine, also a stranger's.
    options: dict[str, Any] = {"address": "local", "include_dashboard": False}
    if not local:
        options = {"address": address}
    try:
        ray.init(
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            runtime_env=_finding(modules) if modules else None,
            **options,
        )
    except (ConnectionError, ValueError) as error:
        if local:
            raise
        reason = str(error).partition("\n")[0]
        raise CommandError(f"{given} {address}: no Ray cluster answers there: {reason}") from error
    try:
        yield local
    finally:
        ray.shutdown()


def _finding(modules: Path) -> dict[str, Any]:
    """The runtime environment of workers that find modules in a folder, after installed ones."""
    folder = str(modules)
    return {"worker_process_setup_hook": lambda: sys.path.append(folder)}


def prepare(verbose: bool) -> None:
    """Sets up Tune's switches and silences what is no error.

    Args:
        verbose: Silence nothing.
    """
    os.environ.update(_TUNE_SETTINGS)
    if verbose:
        return
    os.environ.update(_QUIET_SETTINGS)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Tune repeats at its end, as an error, which trials failed; the command tells that itself.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(ray|gymnasium)(\.|$)")


def lacking_resources(config: AlgorithmConfig) -> str | None:
    """Tells what a run needs and the cluster does not have; Tune waits for it without a word.

    Args:
        config: A config without search values.

    Returns:
        A sentence with a remedy; None if there are CPUs and GPUs enough.
    """
    assert config.algo_class is not None
    request = config.algo_class.default_resource_request(config)
    required = getattr(request, "required_resources", {})
    available = ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        wanted, there = required.get(kind, 0), available.get(kind, 0)
        if wanted > there:
            return (
                f"the config needs {wanted:g} {kind}s (driver, env runners, learners), but Ray "
                f"has {there:g}; lower num_env_runners (now {config.num_env_runners}), "
                f"num_learners (now {config.num_learners}) or num_gpus_per_learner "
                f"(now {config.num_gpus_per_learner}) by --set"
            )
    return None
