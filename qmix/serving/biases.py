"""What a caller adds to scores: biases of single ids, and penalties on ids of the reply so far.

Each is a logits processor of one request; see qmix.generation.logits_processors. Knows no requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitBias:
    """Adds to the scores of ids, each within the vocabulary."""

    by_id: Mapping[int, float]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, V) with the biases."""
        ids = torch.tensor([*self.by_id], device=scores.device)
        bias = torch.tensor([*self.by_id.values()], dtype=scores.dtype, device=scores.device)
        return scores.index_add(1, ids, bias[None])


@dataclass(frozen=True)
class OccurrencePenalties:
    """OpenAI's: once for an id that the reply holds, and for each time that it does.

    Attributes:
        prompt_tokens: ids before the reply, which do not count.
    """

    prompt_tokens: int
    presence: float = 0.0
    frequency: float = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, V) less the penalties, by the ids so far (1, L)."""
        reply = input_ids[:, self.prompt_tokens :].to(scores.device)
        times = torch.zeros_like(scores).scatter_add(
            1, reply, torch.ones_like(reply, dtype=scores.dtype)
        )
        return scores - self.presence * (times > 0) - self.frequency * times
