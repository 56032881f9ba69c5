"""A model's evaluation mode while it generates, for any number of generations at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn


class EvaluationMode:
    """Puts a model into evaluation mode with the first generation, and back after the last.

    Generations overlap where threads share a model, and where a stream is left and resumed.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._running = 0
        self._training = False  # the mode of before

    @contextmanager
    def during(self, model: nn.Module) -> Iterator[None]:
        """In evaluation mode; the mode of before returns when no generation needs this one."""
        with self._lock:
            self._training = model.training or (self._running > 0 and self._training)
            self._running += 1
            model.eval()
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    model.train(self._training)

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of a model does not generate yet."""
        return EvaluationMode, ()
