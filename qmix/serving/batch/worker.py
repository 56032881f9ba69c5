"""A model that answers lines: loaded once, in this process or in one of Ray's.

Knows no file of results.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmix.generation.config import CONTINUATION, GenerationConfig
from qmix.models.auto import load
from qmix.models.options import LoadOptions
from qmix.serving.batch.answering import ahead, answers
from qmix.serving.batch.prompt_lines import Asking, PromptLine
from qmix.serving.engine import Engine
from qmix.serving.limits import Limits


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What decides a result, and how the model is run; it goes to other processes as it is.

    Attributes:
        source: the checkpoint.
        config: how replies are chosen, where a line does not say.
        slots, context: see qmix.serving.limits.
        dtype: of the model, where it is not the checkpoint's.
        load: called where the worker is, whose devices it is about.
    """

    source: Path
    config: GenerationConfig
    template: str | None
    slots: int
    context: int
    dtype: torch.dtype | None
    load: Callable[[], LoadOptions]

    @property
    def said(self) -> str:
        """What decides a result, besides the line."""
        named = (self.source.name, self.config, self.template, self.context, self.dtype)
        return repr(named)


class Worker:
    """An engine with its model."""

    def __init__(
        self, settings: WorkerSettings, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """
        Raises:
            QmixError: the model cannot be loaded.
        """
        self._said = settings.said
        model, tokenizer = load(settings.source, load_options=settings.load(), progress=progress)
        limits = Limits(
            context=settings.context, slots=settings.slots, waiting=ahead(settings.slots)
        )
        config = settings.config.filled_from(model.generation_config).filled_from(CONTINUATION)
        self._asking = Asking(tokenizer, config, settings.template)
        self._engine = Engine(model, tokenizer, limits)

    def answers(self, lines: Iterable[PromptLine]) -> Iterator[dict[str, Any]]:
        """The result of each line, in order; see `answering.answers`."""
        return answers(self._engine, self._asking, lines, self._said)

    def close(self) -> None:
        """End what runs."""
        self._engine.close(0.0)
