"""Replica: a service in a process of Ray's. Knows no other replicas."""

from starlette.applications import Starlette

from qmix.errors import QmixError
from qmix.serving.http.service import Service, ServiceSettings


class Replica:
    """What Ray Serve builds, asks for its health, and takes apart once its requests have ended."""

    def __init__(self, settings: ServiceSettings) -> None:
        """
        Raises:
            QmixError: see Service.begun.
        """
        self._service = Service.begun(settings)

    def __serve_build_asgi_app__(self) -> Starlette:
        """See ray.serve.ingress."""
        return self._service.app

    def check_health(self) -> None:
        """See Ray Serve, which replaces a replica whose engine takes no requests.

        Raises:
            QmixError: it takes none.
        """
        engine = self._service.engine
        if not engine.healthy:
            raise engine.failure or QmixError("the engine takes no requests")

    def __del__(self) -> None:
        """See Ray Serve: stored prompts are written to their end."""
        if hasattr(self, "_service"):
            self._service.engine.close(0.0)
