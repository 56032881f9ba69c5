"""The choice of a step: rules, the user's processors, temperature and filters, then the draw.

In Hugging Face's order. Shape letters: B rows, L context columns, V vocabulary. Knows no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.generation.logits_processors import (
    LogitsProcessor,
    without_ids,
    without_repeated_ngrams,
    without_words,
)
from qmix.generation.sampling import Sampling


@dataclass(frozen=True)
class SampleFn:
    """Scores (B, V) and ids (B,) from logits (B, V), reading nothing back; see Sampling.sample."""

    sampling: Sampling
    generator: torch.Generator | None

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.sampling.warped(logits)
        return scores, self.sampling.sample(scores, self.generator)


class TokenSelector:
    """What a GenerationConfig does to the logits of a step.

    Args:
        processors: the user's own, after the rules and before the temperature.
        generator: of the draw; None takes torch's global generator.
    """

    def __init__(
        self,
        config: GenerationConfig,
        processors: Sequence[LogitsProcessor],
        generator: torch.Generator | None,
    ) -> None:
        self._config = config
        self._sampling = config.sampling
        self._processors = processors
        self._generator = generator

    def scores(
        self, logits: Tensor, context: Tensor, attention_mask: Tensor | None, step: int
    ) -> Tensor:
        """Scores (B, V) of the logits (B, V) after all processors, excluded ids at -inf.

        Args:
            context: ids so far (B, L).
            attention_mask: bool (B, L), False at padding.
            step: new tokens before this one.
        """
        config = self._config
        scores = self._sampling.penalised(logits, context, attention_mask)
        if config.no_repeat_ngram_size:
            scores = without_repeated_ngrams(
                scores, context, attention_mask, config.no_repeat_ngram_size
            )
        if config.bad_words_ids:
            scores = without_words(scores, context, config.bad_words_ids, config.eos_ids)
        if step < config.min_new_tokens and config.eos_ids:
            scores = without_ids(scores, config.eos_ids)
        for processor in self._processors:
            scores = _processed(processor, context, scores)
        return self._sampling.warped(scores)

    @property
    def sample_fn(self) -> SampleFn | None:
        """The choice as a function of a step's logits alone; None if it needs more than them.

        A global generator is nothing that a recorded step may use: it is others' too.
        """
        config = self._config
        rules = config.no_repeat_ngram_size or config.bad_words_ids or self._processors
        held_back = config.min_new_tokens and config.eos_ids
        if rules or held_back or self._sampling.repetition_penalty != 1:
            return None
        if self._generator is None and not self._sampling.greedy:
            return None
        return SampleFn(self._sampling, None if self._sampling.greedy else self._generator)

    def __call__(self, scores: Tensor) -> Tensor:
        """Token ids (B,) from processed scores (B, V)."""
        return self._sampling.choose(scores, self._generator)


def _processed(processor: LogitsProcessor, context: Tensor, scores: Tensor) -> Tensor:
    found = processor(context, scores)
    if isinstance(found, Tensor) and found.shape == scores.shape:
        return found
    raise UsageError(
        "a processor gave no scores",
        where="logits_processor",
        expected=f"a tensor {list(scores.shape)}",
        found=list(found.shape) if isinstance(found, Tensor) else repr(found)[:80],
    )
