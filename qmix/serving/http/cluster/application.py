"""The application as Ray Serve is told of it: how many replicas, on what, and with which limits.

Written for Ray 2.60. Requests go by Ray's power of two choices: of two replicas that are drawn, to
the one with fewer. Its prefix-aware router reads the requests of vLLM and SGLang only.
"""

from typing import TYPE_CHECKING, Any

from qmix.errors import UsageError
from qmix.serving.http.cluster.replica import Replica
from qmix.serving.http.cluster.scale import Scale
from qmix.serving.http.service import ServiceSettings

if TYPE_CHECKING:
    from ray.serve import Application

# Three failures of a check make Ray replace a replica.
_HEALTH_PERIOD_S = 5.0
_RETRY_S = 1.0
# A checkpoint that cannot be loaded once cannot be loaded the next time either.
_ATTEMPTS = 2


def options(settings: ServiceSettings, scale: Scale) -> dict[str, Any]:
    """The options of the deployment; see ray.serve.deployment.

    Raises:
        UsageError: nothing may wait.
    """
    slots, waiting = settings.limits.slots, settings.limits.waiting
    if waiting == 0:
        raise UsageError(
            "a proxy of Ray lets requests wait", where="--queue", expected="at least 1", found=0
        )
    # One is not said, so that a config file may say how many.
    count: dict[str, Any] = {} if scale.least == 1 else {"num_replicas": scale.least}
    if scale.least < scale.most:
        autoscaling = {"min_replicas": scale.least, "max_replicas": scale.most}
        count = {"autoscaling_config": {**autoscaling, "target_ongoing_requests": slots}}
    return {
        **count,
        "name": "Replica",
        "ray_actor_options": {"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        # What waits does so at the proxy, for the replica that is free first.
        "max_ongoing_requests": slots,
        "max_queued_requests": waiting,
        "backpressure_config": {"status_code": 429, "retry_after_s": _RETRY_S},
        "health_check_period_s": _HEALTH_PERIOD_S,
        # A replica that is replaced or removed first answers what it has begun.
        "graceful_shutdown_timeout_s": settings.deadline_s,
        "max_constructor_retry_count": _ATTEMPTS,
    }


def application(settings: ServiceSettings, scale: Scale) -> "Application":
    """The application, for ray.serve.run."""
    from ray import serve

    deployment = serve.deployment(**options(settings, scale))(serve.ingress()(Replica))
    return deployment.bind(settings)
