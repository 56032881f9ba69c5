"""Rows: a batch while it grows: its ids and mask, which rows have ended, and their texts.

Knows no model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qmix.generation.inputs import GenerationInputs
from qmix.generation.padding import without_full_mask
from qmix.generation.stopping import RowText, StoppingCriterion, rows_to_stop
from qmix.text.detokenizer import StreamDetokenizer


class Rows:
    """The rows of one generation, one column longer after each step.

    Attributes:
        input_ids: int64 (B, L), the ids so far, on the model's device; the new ids only after a
            prompt of embeddings.
        attention_mask: bool (B, P + new ids), False at padding, on the same device; None: no
            padding.
        ended: bool (B,), on the CPU.
    """

    def __init__(self, inputs: GenerationInputs, device: torch.device) -> None:
        """`inputs` must be padded on the left."""
        prompt_ids = inputs.prompt_ids
        self.input_ids = prompt_ids.to(device, torch.int64)
        self.attention_mask = without_full_mask(inputs.attention_mask, device)
        self.ended = torch.zeros(len(prompt_ids), dtype=torch.bool)
        self._criteria: Sequence[StoppingCriterion] = inputs.stopping_criteria
        self._eos = torch.tensor(inputs.config.eos_ids, dtype=torch.long)
        self._pad_id = inputs.config.pad_id
        self._texts: list[RowText] = []
        if inputs.tokenizer is not None:
            prompts = [[]] * len(prompt_ids) if inputs.starts_new_text else prompt_ids.tolist()
            self._texts = [
                RowText(
                    StreamDetokenizer(inputs.tokenizer, prompt=prompt),
                    inputs.config.eos_ids,
                    inputs.config.stops,
                )
                for prompt in prompts
            ]

    @property
    def ids_mask(self) -> Tensor | None:
        """The attention mask of `input_ids`, (B, L)."""
        if self.attention_mask is None:
            return None
        return self.attention_mask[:, self.attention_mask.shape[1] - self.input_ids.shape[1] :]

    def append(self, ids: Tensor, scores: Tensor, *, last: bool) -> tuple[Tensor, tuple[str, ...]]:
        """Add a step's ids (B,), on the CPU; rows that have ended get the padding id instead.

        Args:
            scores: (B, V), that the ids were chosen from; for the stopping criteria.
            last: no step follows, so that every text ends here.

        Returns:
            the ids as they were added, and the text that each row's id completes; no texts without
            a tokenizer.
        """
        ids = torch.where(self.ended, self._pad_id, ids)
        self.ended = self.ended | torch.isin(ids, self._eos)
        column = ids.to(self.input_ids.device)[:, None]
        self.input_ids = torch.cat((self.input_ids, column), 1)
        if self.attention_mask is not None:
            seen = torch.ones_like(column, dtype=torch.bool)
            self.attention_mask = torch.cat((self.attention_mask, seen), 1)
        for criterion in self._criteria:
            self.ended = self.ended | rows_to_stop(criterion, self.input_ids, scores)
        texts = tuple(
            text.put(int(token), last=last or bool(ended))
            for text, token, ended in zip(self._texts, ids, self.ended, strict=False)
        )
        if self._texts:
            self.ended = self.ended | torch.tensor([text.ended for text in self._texts])
        return ids, texts
