"""What is served, from the options of `qmix serve` or from the arguments of a config of Ray's.

Heavy imports stay inside the functions.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qmix.commands import options, sources

if TYPE_CHECKING:
    from qmix.serving.http.guard import Access
    from qmix.serving.http.service import ServiceSettings

SLOTS, QUEUE, TIMEOUT_S = 8, 64, 600.0


def service_settings(
    source: Path,
    access: "Access",
    *,
    name: str | None = None,
    template: str | None = None,
    ctx: int | None = None,
    slots: int = SLOTS,
    queue: int = QUEUE,
    timeout: float = TIMEOUT_S,
    log_prompts: Path | None = None,
    reuse: options.Reuse = options.REUSE,
    load: options.Load = options.LOAD,
) -> "ServiceSettings":
    """The settings of a service. Its paths are absolute: it may run in another folder.

    Raises:
        QmixError: see sources.checked_context and Limits.
    """
    from qmix.serving.http.service import ServiceSettings
    from qmix.serving.limits import Limits

    context = sources.checked_context(source, ctx, default=options.SERVED_CONTEXT)
    limits = Limits(context=context, slots=slots, waiting=queue)
    reuse = replace(reuse, prompt_cache=_absolute(reuse.prompt_cache))
    copies = int(reuse.prompt_cache is not None)  # of a text that is being written
    return ServiceSettings(
        source=source.absolute(),
        name=name or source.resolve().name,
        template=_template(template),
        limits=limits,
        load=partial(load.parse, context, slots + copies),
        prompts=partial(reuse.prompts, source.absolute()),
        speculate=reuse.speculate != "off",
        access=access,
        deadline_s=timeout,
        prompt_log=_absolute(log_prompts),
    )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _template(given: str | None) -> str | None:
    """The template; a file's path is absolute."""
    if given is None:
        return None
    path = Path(given)
    is_path = path.name != given or path.suffix != ""  # and no template's name
    return str(path.absolute()) if is_path and path.is_file() else given
