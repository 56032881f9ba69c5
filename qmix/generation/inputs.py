"""GenerationInputs: everything that one generation starts from, in one object.

Knows no model: what depends on its width is checked when the width is given.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor

from qmix.errors import UsageError, wrong_type
from qmix.generation.config import GenerationConfig
from qmix.generation.drafted_text import Drafter
from qmix.generation.logits_processors import LogitsProcessor
from qmix.generation.padding import check_embeds, check_prompt, checked_mask, left_padded
from qmix.generation.stopping import StoppingCriterion
from qmix.nn.cache import KVCache
from qmix.text.tokenizer import LlamaTokenizer


@dataclass(frozen=True, eq=False)
class GenerationInputs:
    """The prompt, what is known of it already, and the rules for what follows.

    Attributes:
        input_ids: the prompt, int64 (B, P).
        config: when to stop and how to choose.
        attention_mask: (B, P), 0 or False at padding, on whichever side; kept as bool.
        inputs_embeds: (B, P, D), the prompt instead of input_ids. Processors, criteria and texts
            then know the new ids only.
        cache: holds the first `cache.length < P` columns already; the rest is prefilled into it.
            After each step it holds all columns but the newest.
        tokenizer: decodes the new ids to text; needed for stop strings.
        starts_new_text: the new ids are a text of their own (a chat's reply). Otherwise they
            continue the prompt's text, so that a leading space is kept.
        logits_processor: each `(ids so far (B, L), scores (B, V)) -> scores`, after the penalties
            and before the temperature.
        stopping_criteria: each `(ids so far (B, L), scores (B, V)) -> bool`, for all rows or one a
            row (B,); where true, the row ends.
        drafter: what earlier texts were and what was measured while they were written, where ids
            are drafted (config.prompt_lookup_num_tokens); None: this is the first text.

    Raises:
        UsageError: the attention mask is none, or the tokenizer.
    """

    input_ids: Tensor | None
    config: GenerationConfig = field(default_factory=GenerationConfig)
    _: KW_ONLY
    attention_mask: Tensor | None = None
    inputs_embeds: Tensor | None = None
    cache: KVCache | None = None
    tokenizer: LlamaTokenizer | None = None
    starts_new_text: bool = False
    logits_processor: Sequence[LogitsProcessor] = ()
    stopping_criteria: Sequence[StoppingCriterion] = ()
    drafter: Drafter | None = None

    def __post_init__(self) -> None:
        if self.attention_mask is not None:
            mask = checked_mask(self.attention_mask).bool()
            object.__setattr__(self, "attention_mask", mask)
        if self.tokenizer is not None and not isinstance(self.tokenizer, LlamaTokenizer):
            raise wrong_type("tokenizer", "a LlamaTokenizer", self.tokenizer)

    def check(self, hidden_size: int) -> None:
        """Check the prompt, and that the parts go together.

        Raises:
            UsageError: both or neither of ids and embeddings, a wrong shape or dtype, a row of
                padding alone, embeddings without a cache, stop strings without a tokenizer.
        """
        if self.inputs_embeds is None:
            check_prompt(self.input_ids, self.attention_mask)
        elif self.input_ids is not None:
            raise UsageError("give input_ids or inputs_embeds, and not both")
        else:
            check_embeds(self.inputs_embeds, self.attention_mask, hidden_size)
            if not self.config.use_cache:
                raise UsageError("generating from embeddings needs a cache", where="use_cache")
        if self.config.stops and self.tokenizer is None:
            raise UsageError(
                "stop strings need a tokenizer",
                where="stop_strings",
                remedy="Pass tokenizer=, or load the model with qmix.load.",
            )

    @property
    def columns(self) -> Tensor:
        """The prompt: ids (B, P) or embeddings (B, P, D)."""
        columns = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        assert columns is not None, "check comes first"
        return columns

    @property
    def prompt_ids(self) -> Tensor:
        """The ids that are known before the first step: (B, P), or (B, 0) after embeddings."""
        if self.input_ids is not None:
            return self.input_ids
        return torch.empty(self.columns.shape[0], 0, dtype=torch.long)

    def repeated(self, copies: int) -> "GenerationInputs":
        """Each row followed by its copies."""
        if copies == 1:
            return self
        mask = self.attention_mask
        mask = None if mask is None else mask.repeat_interleave(copies, 0)
        return self._with_prompt(self.columns.repeat_interleave(copies, 0), mask)

    def left_padded(self) -> "GenerationInputs":
        """The same rows with all padding moved to the left, where no new token follows it.

        Raises:
            UsageError: columns would move that the cache holds already.
        """
        if self.attention_mask is None:
            return self
        columns, mask = left_padded(self.columns, self.attention_mask)
        moved = not torch.equal(self.attention_mask, mask)
        if moved and self.cache is not None and self.cache.length:
            raise UsageError("a cache goes with padding on the left only", where="attention_mask")
        return self._with_prompt(columns, mask)

    def _with_prompt(self, columns: Tensor, mask: Tensor | None) -> "GenerationInputs":
        if self.inputs_embeds is None:
            return replace(self, input_ids=columns, attention_mask=mask)
        return replace(self, inputs_embeds=columns, attention_mask=mask)
