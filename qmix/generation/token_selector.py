"""TokenSelector: from the logits of a step to the next ids, in Hugging Face's order.

Rules of the config, the caller's processors, temperature and filters, then the sample. Knows no
models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.generation.host_copy import HostCopy
from qmix.generation.logits_processors import (
    LogitsProcessor,
    without_ids,
    without_repeated_ngrams,
    without_words,
)
from qmix.generation.sampling import Sampling


@dataclass(frozen=True, eq=False)
class SampledStep:
    """The result of a step. On a GPU it may still be computed when it is returned.

    Attributes:
        logits, scores: float32 (B, V), before and after all processors.
        ids: the next ids, int64 (B,), on the model's device; the next step may overwrite them.
        ids_on_host: the same, on their way to the CPU.
    """

    logits: Tensor
    scores: Tensor
    ids: Tensor
    ids_on_host: HostCopy


@dataclass(frozen=True)
class SampleFn:
    """Scores (B, V) and ids (B,) from logits (B, V), without waiting for the device.

    An id is -1 where the scores have no finite maximum; see Sampling.sample.
    """

    sampling: Sampling
    generator: torch.Generator | None

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.sampling.warped(logits)
        return scores, self.sampling.sample(scores, self.generator)


class TokenSelector:
    """What a GenerationConfig does to the logits of a step.

    Args:
        processors: the caller's own, applied after the rules and before the temperature.
        generator: for sampling; None takes torch's global generator.
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

    @property
    def sample_fn(self) -> SampleFn | None:
        """The selection as a function of the logits alone; None if it needs more than them.

        Also None where it would take torch's global generator, which other code shares.
        """
        config = self._config
        has_rules = config.no_repeat_ngram_size or config.bad_words_ids or self._processors
        holds_eos_off = config.min_new_tokens and config.eos_ids
        if has_rules or holds_eos_off or self._sampling.repetition_penalty != 1:
            return None
        if self._generator is None and not self._sampling.greedy:
            return None
        return SampleFn(self._sampling, None if self._sampling.greedy else self._generator)

    def select(
        self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int
    ) -> SampledStep:
        """Choose the next ids from logits (B, V).

        Args:
            input_ids: ids so far (B, L).
            attention_mask: bool (B, L), False at padding.
            new_tokens: how many were chosen before these.

        Raises:
            UsageError: a processor returns something else than scores.
            QmixError: the scores hold no finite maximum.
        """
        scores = self._scores(logits, input_ids, attention_mask, new_tokens)
        ids = self._sampling.choose(scores, self._generator)
        return SampledStep(logits, scores, ids, HostCopy(ids))

    def _scores(
        self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int
    ) -> Tensor:
        """Scores (B, V) after all processors, excluded ids at -inf."""
        config = self._config
        scores = self._sampling.penalised(logits, input_ids, attention_mask)
        if config.no_repeat_ngram_size:
            scores = without_repeated_ngrams(
                scores, input_ids, attention_mask, config.no_repeat_ngram_size
            )
        if config.bad_words_ids:
            scores = without_words(scores, input_ids, config.bad_words_ids, config.eos_ids)
        if new_tokens < config.min_new_tokens and config.eos_ids:
            scores = without_ids(scores, config.eos_ids)
        for processor in self._processors:
            scores = _processed(processor, input_ids, scores)
        return self._sampling.warped(scores)


def _processed(processor: LogitsProcessor, input_ids: Tensor, scores: Tensor) -> Tensor:
    result = processor(input_ids, scores)
    if isinstance(result, Tensor) and result.shape == scores.shape:
        return result
    raise UsageError(
        "a logits processor returned no scores",
        where="logits_processor",
        expected=f"a tensor {list(scores.shape)}",
        found=list(result.shape) if isinstance(result, Tensor) else repr(result)[:80],
    )
