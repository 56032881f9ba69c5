"""What the sampler chose from, token by token: the likeliest ids, with the probabilities it saw.

Knows no text and no terminal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ALTERNATIVES = 5


@dataclass(frozen=True)
class Choice:
    """One token of a reply, and the likeliest ids at its place, itself among them if it is one.

    Probabilities are those after temperature, filters and penalties; an excluded id has 0.
    """

    id: int
    probability: float
    likeliest: tuple[tuple[int, float], ...]


class ChoiceRecord:
    """The choices of one reply. They stay on the model's device until somebody asks for them."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, Tensor, Tensor]] = []

    def add(self, index: int, scores: Tensor) -> None:
        """Record a step: the id that was chosen from scores (V,), excluded ids at -inf."""
        likeliest = scores.topk(min(ALTERNATIVES, len(scores)))
        values = torch.cat((scores[index : index + 1], likeliest.values))
        self._steps.append((index, likeliest.indices, values - scores.logsumexp(-1)))

    def choices(self) -> list[Choice]:
        """Every step so far."""
        return [
            Choice(index, own, tuple(zip(ids.tolist(), others, strict=True)))
            for index, ids, logs in self._steps
            for own, *others in [logs.exp().tolist()]
        ]

    def __len__(self) -> int:
        return len(self._steps)
