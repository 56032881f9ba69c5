"""`qmix serve`: a model for the programs that speak OpenAI's API.

Heavy imports stay inside the functions.
"""

import ipaddress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmix.commands import json_log, options, sources, terminal
from qmix.commands.api_key import VARIABLE, read_key
from qmix.commands.serve_ray import RAY, RayOptions, serve_ray
from qmix.commands.service_settings import QUEUE, SLOTS, TIMEOUT_S, service_settings
from qmix.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from qmix.serving.http.service import ServiceSettings

_PACKAGES = ("starlette", "uvicorn", "prometheus_client", "llguidance")  # of the extra
_NET, _WORK = "Network", "Requests"

Model = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL", help="Folder, GGUF file, or ORG/NAME of the hub.", show_default=False
    ),
]
Demo = Annotated[bool, typer.Option("--demo", help="Serve the tiny model of a checkout.")]
Host = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_NET)]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=_NET)
]
Key = Annotated[
    str | None,
    typer.Option(
        help="Key that callers must give; others on this machine can see it here.",
        show_default=VARIABLE,
        rich_help_panel=_NET,
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="File with the key.", show_default=False, rich_help_panel=_NET),
]
HostName = Annotated[
    list[str] | None,
    typer.Option(
        help="Name under which callers reach it; may be repeated.",
        show_default="localhost, and addresses",
        rich_help_panel=_NET,
    ),
]
Name = Annotated[
    str | None, typer.Option(help="The model's name.", show_default="MODEL's last part")
]
Queue = Annotated[
    int, typer.Option(min=0, max=1 << 20, help="Requests that may wait.", rich_help_panel=_WORK)
]
Timeout = Annotated[
    float, typer.Option(min=1, help="Seconds that a request may take.", rich_help_panel=_WORK)
]
LogPrompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Append what callers ask to FILE, in lines of JSON.",
        show_default="prompts are not logged",
        rich_help_panel=_WORK,
    ),
]


@options.grouped
def serve(
    model: Model = None,
    demo: Demo = False,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = None,
    api_key_file: KeyFile = None,
    host_name: HostName = None,
    name: Name = None,
    template: options.Template = None,
    slots: options.Slots = SLOTS,
    ctx: options.ServedContext = None,
    queue: Queue = QUEUE,
    timeout: Timeout = TIMEOUT_S,
    log_prompts: LogPrompts = None,
    ray: RayOptions = RAY,
    log_json: json_log.LogJson = False,
    quiet: options.Quiet = False,
    yes: options.Yes = False,
    reuse: options.Reuse = options.REUSE,
    load: options.Load = options.LOAD,
) -> None:
    """Serve a model to programs that speak OpenAI's API.

    Requests run together, in slots. Only this machine can call, unless --host says otherwise; then
    a key is needed. Ctrl-C or SIGTERM lets requests go on for 6 seconds and ends; with --ray, for
    as long as they take.

    Examples:
      qmix serve mixtral-nf4
      qmix serve --demo --port 8080
      qmix serve mixtral-nf4 --host 0.0.0.0 --api-key-file key.txt
      qmix serve mixtral-nf4 --ray --replicas 4
    """
    scale = ray.parse(log_json=log_json)
    key = _checked_key(host, api_key, api_key_file)
    source = _source(model, demo=demo, yes=yes)
    _check_extra()
    from qmix.serving.http.guard import Access

    settings = service_settings(
        source,
        Access(key, frozenset(map(str.lower, host_name or ()))),
        name=name,
        template=template,
        ctx=ctx,
        slots=slots,
        queue=queue,
        timeout=timeout,
        log_prompts=log_prompts,
        reuse=reuse,
        load=load,
    )
    if scale is not None:
        serve_ray(settings, scale, host, port, device=load.device, quiet=quiet)
    else:
        _serve_here(settings, host, port, quiet=quiet)


def _serve_here(settings: "ServiceSettings", host: str, port: int, *, quiet: bool) -> None:
    """Serve in this process until a signal.

    Raises:
        QmixError: see Service.begun and server.serve.
    """
    from qmix.commands.load_bar import load_bar
    from qmix.serving.http import server
    from qmix.serving.http.service import Service

    with server.listening(host, port) as listener:
        with load_bar(quiet=quiet or json_log.is_on()) as bar:
            service = Service.begun(settings, bar)
        announce = partial(_announce, settings, listener.getsockname(), quiet=quiet)
        server.serve(service.app, service.engine, listener, announce)


def _source(model: Path | None, *, demo: bool, yes: bool) -> Path:
    """
    Raises:
        UsageError: neither a model nor --demo, or both.
        QmixError: see sources.local.
    """
    if demo == (model is not None):
        found = "both" if demo else "neither"
        raise UsageError("nothing to serve", expected="MODEL or --demo", found=found)
    if model is not None:
        return sources.local(model, yes=yes)
    from qmix.evals.training import tiny_model

    return tiny_model.directory()


def _checked_key(host: str, given: str | None, file: Path | None) -> str | None:
    """The key of the command line, of its file, or of the environment.

    Raises:
        UsageError: two keys, one that is none, or none where other machines can call.
        CheckpointError: the file cannot be read.
    """
    key = read_key(file, given)
    if key is None and not _is_loopback(host):
        raise UsageError(
            "other machines can call this address, and there is no key",
            where="--host",
            found=host,
            remedy=f"Give --api-key-file, or set {VARIABLE}.",
        )
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_extra() -> None:
    """
    Raises:
        UnsupportedError: the packages of the extra are not installed.
    """
    from importlib.util import find_spec

    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            "qmix serve needs " + ", ".join(missing),
            remedy="Run: pip install 'qmix-runtime[serve]'",
        )


def _announce(settings: "ServiceSettings", address: tuple[str, int], *, quiet: bool) -> None:
    """Say where the server is, unless nobody wants to know."""
    host, port = address[:2]
    shown = f"[{host}]" if ":" in host else host
    if json_log.is_on():
        json_log.tell(
            "serving",
            model=settings.name,
            url=f"http://{shown}:{port}/v1",
            slots=settings.limits.slots,
            context=settings.limits.context,
        )
    elif not quiet:
        terminal.message(
            f"serving {settings.name} at http://{shown}:{port}/v1 · {settings.limits.slots} slots of "
            f"{settings.limits.context:,} tokens · Ctrl-C ends it"
        )
