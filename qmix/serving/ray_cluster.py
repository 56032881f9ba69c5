"""The Ray cluster whose processes answer: one that runs already, or one of this process alone.

Knows no models.
"""

import logging
import os
from importlib.util import find_spec

from qmix.errors import QmixError, UnsupportedError

_ADDRESS = "RAY_ADDRESS"


def check_extra() -> None:
    """
    Raises:
        UnsupportedError: Ray is missing.
    """
    if find_spec("ray") is None:
        raise UnsupportedError("--ray needs ray", remedy="Run: pip install 'qmix-runtime[ray]'")


def is_own() -> bool:
    """Whether `join` starts a cluster of this process alone: no environment names another."""
    return not os.environ.get(_ADDRESS)


def join() -> None:
    """Join the cluster that RAY_ADDRESS names, or else start one on this machine.

    What is started here asks whoever connects for Ray's token, as Ray has it since 2.60, reports
    nothing to Ray's makers, and ends with this process.

    Raises:
        QmixError: there is no cluster at the address.
    """
    import ray

    address = os.environ.get(_ADDRESS)
    own: dict[str, object] = {}
    if is_own():
        own = {"include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address or "local",
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **own,
        )
    except Exception as error:
        raise QmixError(
            "cannot join a Ray cluster", where=address, found=str(error).strip()[-400:]
        ) from error


def has_gpus() -> bool:
    """Whether any machine of the cluster has one."""
    import ray

    return bool(ray.cluster_resources().get("GPU"))
