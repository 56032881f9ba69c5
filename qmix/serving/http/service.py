"""Service: a model that is loaded, the engine that runs it, and the application that speaks for it.

Knows no sockets, and not in which process it is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette

from qmix.generation.prompt_cache import PromptCache
from qmix.models.auto import load
from qmix.models.options import LoadOptions
from qmix.serving.engine import Engine
from qmix.serving.http.app import app
from qmix.serving.http.guard import Access
from qmix.serving.http.prompt_log import PromptLog
from qmix.serving.http.served_model import ServedModel
from qmix.serving.http.tracing import tracer
from qmix.serving.limits import Limits


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What is served, and to whom. It can be pickled, for a process on another machine.

    Attributes:
        source: the checkpoint.
        name: of the model, as callers give it.
        template: see qmix.text.chat_format.chosen_template.
        load, prompts: called where the service is, whose devices and folders they are about.
        speculate: see qmix.serving.scheduler.
        deadline_s: seconds that a request may take.
        prompt_log: the file in which what callers ask is logged; None: it is not.
    """

    source: Path
    name: str
    template: str | None
    limits: Limits
    load: Callable[[], LoadOptions]
    prompts: Callable[[], PromptCache | None]
    speculate: bool
    access: Access
    deadline_s: float
    prompt_log: Path | None


@dataclass(frozen=True)
class Service:
    """An engine that runs, and its application."""

    engine: Engine
    app: Starlette

    @classmethod
    def begun(
        cls, settings: ServiceSettings, progress: Callable[[int, int], None] | None = None
    ) -> "Service":
        """Load the model.

        Args:
            progress: see qmix.models.auto.load.

        Raises:
            QmixError: the model cannot be loaded, or a file or folder not be written to.
        """
        log = None if settings.prompt_log is None else PromptLog(settings.prompt_log)
        prompts, limits, spans = settings.prompts(), settings.limits, tracer()
        model, tokenizer = load(settings.source, load_options=settings.load(), progress=progress)
        served = ServedModel.of(
            model,
            tokenizer,
            limits,
            name=settings.name,
            created=int(time.time()),
            template=settings.template,
        )
        engine = Engine(model, tokenizer, limits, speculate=settings.speculate, prompts=prompts)
        application = app(
            engine,
            served,
            settings.access,
            deadline_s=settings.deadline_s,
            prompts=log,
            tracer=spans,
        )
        return cls(engine, application)
