"""The service of `qmix serve` for a config file of Ray Serve's, or a RayService of KubeRay.

Heavy imports stay inside the functions.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmix.commands import options
from qmix.commands.api_key import VARIABLE, read_key
from qmix.commands.service_settings import service_settings
from qmix.errors import UsageError
from qmix.planning.byte_sizes import parse_count

if TYPE_CHECKING:
    from ray.serve import Application

_NAMES = ("name", "template", "slots", "queue", "timeout")
_FILES = ("api_key_file", "log_prompts")
_LOAD, _REUSE = ([field.name for field in fields(kind)] for kind in (options.Load, options.Reuse))


def application(arguments: Mapping[str, Any]) -> "Application":
    """What `import_path: qmix.commands.ray_config:application` names.

    Args:
        arguments: `args` there: `model`, a folder; `host_names`; and options of `qmix serve`, with
            underscores. `deployments` says how many replicas there are and what each takes.

    Raises:
        QmixError: an argument is unknown or wrong, or there is no key; see `qmix serve`.
    """
    known = ("model", "host_names", "ctx", *_NAMES, *_FILES, *_LOAD, *_REUSE)
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in given:
        if name not in known:
            raise UsageError("unknown", where=f"args: {name}", expected=", ".join(known))
    if "model" not in given:
        raise UsageError("nothing to serve", where="args", expected="model")
    paths = {name: Path(given[name]) for name in (*_FILES, "prompt_cache") if name in given}
    key = read_key(paths.pop("api_key_file", None))
    if key is None:
        raise UsageError(
            "other machines can call this service, and there is no key",
            where="args",
            expected=f"api_key_file, or {VARIABLE} in the environment",
        )
    from qmix.serving.http.cluster.application import application as of
    from qmix.serving.http.cluster.scale import Scale
    from qmix.serving.http.guard import Access

    def chosen(names: list[str] | tuple[str, ...]) -> dict[str, Any]:
        return {name: paths.get(name, given[name]) for name in names if name in given}

    settings = service_settings(
        Path(given["model"]),
        Access(key, frozenset(map(str.lower, given.get("host_names", ())))),
        **chosen((*_NAMES, "log_prompts")),
        ctx=parse_count(str(given["ctx"]), where="args: ctx") if "ctx" in given else None,
        reuse=options.Reuse(**chosen(_REUSE)),
        load=options.Load(**chosen(_LOAD)),
    )
    return of(settings, Scale())
