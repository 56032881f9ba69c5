"""Sampling: from the logits of the last position to the next token id.

Knows nothing of models, caches or text. Shape letters: see qmix.nn.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmix.errors import QmixError, UsageError

if TYPE_CHECKING:  # a wrong option of a command line is refused without torch
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Applied in Hugging Face's order: repetition_penalty, temperature, top_k, top_p, min_p.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities sum to at least p.
        min_p: drop tokens less likely than min_p times the most likely one.
        repetition_penalty: the logits of tokens that a row already contains are divided by it if
            positive, multiplied if negative; 1 is off. It applies to greedy choice too.

    Raises:
        UsageError: a value outside its range, by name.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 1e4)
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise UsageError(
                "out of range",
                where="top_k",
                expected="an integer of at least 0 (0 keeps all)",
                found=repr(self.top_k)[:80],
            )
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 1e4)
        if self.repetition_penalty == 0:
            raise UsageError(
                "out of range", where="repetition_penalty", expected="more than 0", found=0
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < 1e-6  # below it the division overflows float32

    def penalised(
        self, logits: "Tensor", input_ids: "Tensor", attention_mask: "Tensor | None" = None
    ) -> "Tensor":
        """Logits (B, V) in float32 after the repetition penalty.

        Args:
            input_ids: ids so far (B, L).
            attention_mask: bool (B, L), False at padding; None: no padding.
        """
        scores = logits.float()
        if self.repetition_penalty == 1:
            return scores
        return _penalised(scores, input_ids, attention_mask, self.repetition_penalty)

    def warped(self, scores: "Tensor") -> "Tensor":
        """Scores (B, V) after temperature, top_k, top_p and min_p, excluded tokens at -inf.

        Greedy choice leaves them unchanged.
        """
        if self.greedy:
            return scores
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, -1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p < 1:
            scores = _nucleus(scores, self.top_p)
        if self.min_p > 0:
            probabilities = scores.softmax(-1)
            least = self.min_p * probabilities.amax(-1, keepdim=True)
            scores = scores.masked_fill(probabilities < least, -math.inf)
        return scores

    def sample(self, scores: "Tensor", generator: "torch.Generator | None") -> "Tensor":
        """Token ids (B,) from processed scores (B, V), without waiting for the device.

        An id is -1 where the scores have no finite maximum. The random numbers, and so the ids, are
        those of torch.multinomial.
        """
        import torch

        if self.greedy:
            ids = scores.argmax(-1)
        else:
            noise = torch.empty_like(scores).exponential_(generator=generator)
            ids = (scores.softmax(-1) / noise).argmax(-1)
        return torch.where(torch.isfinite(scores.amax(-1)), ids, -1)

    def choose(self, scores: "Tensor", generator: "torch.Generator | None") -> "Tensor":
        """Token ids (B,) from processed scores (B, V).

        Raises:
            QmixError: the scores have no finite maximum; a damaged model must not emit token 0.
        """
        return checked(self.sample(scores, generator))


def checked(ids: "Tensor") -> "Tensor":
    """The ids (B,), as `Sampling.sample` returns them.

    Raises:
        QmixError: one is -1.
    """
    if bool((ids < 0).any()):
        raise QmixError(
            "the model computed non-finite logits",
            remedy="The checkpoint is damaged or overflows in this dtype (try bfloat16), or a "
            "rule excludes every token.",
        )
    return ids


def _penalised(
    scores: "Tensor", input_ids: "Tensor", attention_mask: "Tensor | None", penalty: float
) -> "Tensor":
    """CTRL's repetition penalty (arXiv 1909.05858, section 4.1) on every id of the row."""
    import torch

    seen = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
    ones = (
        torch.ones_like(input_ids, dtype=torch.int32)
        if attention_mask is None
        else attention_mask.int()
    )
    seen = seen.scatter_add(1, input_ids, ones)
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen > 0, penalised, scores)


def _nucleus(scores: "Tensor", top_p: float) -> "Tensor":
    """Keep the most likely tokens until their probabilities sum to top_p; at least one stays."""
    ordered, order = scores.sort(-1, descending=True)
    mass = ordered.softmax(-1)
    mass_before = mass.cumsum(-1) - mass
    drop = mass_before >= top_p
    drop[:, 0] = False
    return scores.masked_fill(drop.scatter(1, order, drop), -math.inf)


def _within(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UsageError(
            "out of range", where=name, expected=f"{low:g} to {high:g}", found=repr(value)[:80]
        )
