"""Rows: a batch while it grows: its ids and mask, which rows have ended, and their texts.

Knows no model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.generation.host_copy import to_device
from qmix.generation.inputs import GenerationInputs
from qmix.generation.padding import without_full_mask
from qmix.generation.stopping import RowText, StoppingCriterion, rows_to_stop
from qmix.text.detokenizer import StreamDetokenizer

_MASKED_AHEAD = 1024  # columns by which a mask grows: none of them is padding


class Rows:
    """The rows of one generation, one column longer after each step.

    New columns stay on the host until `input_ids` or `attention_mask` is asked for: copying one to
    a device would wait for the step that runs there.

    Attributes:
        newest: int64 (B, 1), the last column of `input_ids`, on the CPU.
        ended: bool (B,), on the CPU.
    """

    def __init__(self, inputs: GenerationInputs, device: torch.device) -> None:
        """`inputs` must be padded on the left."""
        prompt_ids = inputs.prompt_ids
        self._input_ids = prompt_ids.to(device, torch.int64)
        self._new: list[Tensor] = []  # columns (B, 1) that `_input_ids` does not have yet
        self._attention_mask = without_full_mask(inputs.attention_mask, device)
        self._columns = 0 if self._attention_mask is None else self._attention_mask.shape[1]
        self.newest = prompt_ids[:, -1:]
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
    def input_ids(self) -> Tensor:
        """The ids so far, int64 (B, L), on the model's device.

        After a prompt of embeddings the new ids only.
        """
        if self._new:
            new = torch.cat(self._new, 1).to(self._input_ids.device)
            self._input_ids = torch.cat((self._input_ids, new), 1)
            self._new.clear()
        return self._input_ids

    @property
    def attention_mask(self) -> Tensor | None:
        """Bool (B, P + new ids), False at padding, on the same device; None: no padding."""
        mask = self._attention_mask
        if mask is None:
            return None
        if mask.shape[1] < self._columns:
            self._attention_mask = mask = F.pad(mask, (0, _MASKED_AHEAD), value=True)
        return mask[:, : self._columns]

    @property
    def ids_mask(self) -> Tensor | None:
        """The attention mask of `input_ids`, (B, L)."""
        mask = self.attention_mask
        return None if mask is None else mask[:, mask.shape[1] - self.input_ids.shape[1] :]

    def fed(self, ids: Tensor) -> Tensor:
        """The ids (B,) of a device as the next step reads them: padding in rows that have ended."""
        if not bool(self.ended.any()):
            return ids
        return torch.where(to_device(self.ended, ids.device), self._pad_id, ids)

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
        self.newest = ids[:, None]
        self._new.append(self.newest)
        self._columns += 1
        for criterion in self._criteria:
            self.ended = self.ended | rows_to_stop(criterion, self.input_ids, scores)
        texts = tuple(
            text.put(int(token), last=last or bool(ended))
            for text, token, ended in zip(self._texts, ids, self.ended, strict=False)
        )
        if self._texts:
            self.ended = self.ended | torch.tensor([text.ended for text in self._texts])
        return ids, texts
