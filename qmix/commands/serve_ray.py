"""`qmix serve --ray`: how many replicas, and the time from their start to their end.

Heavy imports stay inside the functions.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from qmix.commands import options, terminal
from qmix.errors import UsageError
from qmix.quantities import counted

if TYPE_CHECKING:
    from qmix.serving.http.cluster.scale import Scale
    from qmix.serving.http.service import ServiceSettings

_PANEL = "Ray"
_MOST = 4096


@dataclass(frozen=True)
class RayOptions(options.Group):
    """How many replicas serve, as written."""

    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Serve by replicas on a Ray cluster. Needs the extra ray.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST,
            help="Replicas, each with a model of its own.",
            show_default="1",
            rich_help_panel=_PANEL,
        ),
    ] = None
    autoscale: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:MAX",
            help="As many replicas as the requests need.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    cpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST,
            help="CPUs of a replica.",
            show_default="1",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def parse(self, *, log_json: bool = False) -> "Scale | None":
        """What they say; None without --ray.

        Args:
            log_json: whether --log-json was given.

        Raises:
            UsageError: an option without --ray, two numbers of replicas, or no MIN:MAX.
            UnsupportedError: Ray is missing.
        """
        if not self.ray:
            for name in ("replicas", "autoscale", "cpus"):
                if getattr(self, name) is not None:
                    raise UsageError("only for --ray", where=f"--{name}")
            return None
        if log_json:
            raise UsageError(
                "--ray takes no --log-json: Ray logs what its replicas do",
                remedy="Set RAY_SERVE_LOG_ENCODING=JSON.",
            )
        if self.replicas is not None and self.autoscale is not None:
            raise UsageError("--replicas and --autoscale contradict each other")
        count = self.replicas or 1
        bounds = (count, count) if self.autoscale is None else _bounds(self.autoscale)
        from qmix.serving.http.cluster.scale import Scale
        from qmix.serving.ray_cluster import check_extra

        check_extra()
        return Scale(least=bounds[0], most=bounds[1], cpus=self.cpus or 1)


RAY = RayOptions()


def _bounds(text: str) -> tuple[int, int]:
    """
    Raises:
        UsageError: it is no MIN:MAX.
    """
    least, colon, most = text.partition(":")
    numbers = [int(part) for part in (least, most) if part.isascii() and part.isdigit()]
    if not colon or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1] <= _MOST:
        raise UsageError(
            "wrong value",
            where="--autoscale",
            expected="MIN:MAX, such as 1:4",
            found=repr(text)[:80],
        )
    return numbers[0], numbers[1]


def serve_ray(
    settings: "ServiceSettings",
    scale: "Scale",
    host: str,
    port: int,
    *,
    device: str | None,
    quiet: bool,
) -> None:
    """Serve by replicas until a signal.

    Args:
        scale: without GPUs.
        device: that was asked for.

    Raises:
        UsageError: an option that Ray Serve has no use for.
        ResourceError: the address is in use.
        QmixError: Ray cannot serve it.
    """
    if port == 0:
        raise UsageError("wrong value", where="--port", expected="1 to 65535 with --ray", found=0)
    from qmix.serving import ray_cluster
    from qmix.serving.http import server
    from qmix.serving.http.cluster.application import application
    from qmix.serving.http.cluster.foreground import Address, serve

    if ray_cluster.is_own():
        server.listening(host, port).close()  # Ray itself would only say that it waits
    ray_cluster.join()
    gpus = int(ray_cluster.has_gpus() and device != "cpu")
    scale = replace(scale, gpus=gpus)
    address = Address(host=host, port=port, deadline_s=settings.deadline_s)

    def say(text: str) -> None:
        if not quiet:
            terminal.message(text)

    def started() -> None:
        say(
            f"serving {settings.name} at {address.url}/v1 · {_said(scale)} of "
            f"{settings.limits.slots} slots · Ctrl-C ends it"
        )

    serve(application(settings, scale), address, started=started, say=say)


def _said(scale: "Scale") -> str:
    least, most = scale.least, scale.most
    return f"{least} to {most} replicas" if least < most else counted(least, "replica")
