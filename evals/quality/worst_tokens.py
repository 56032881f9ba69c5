"""The tokens of a text at which a model is farthest from its reference, each in its context.

Knows nothing of averages and of pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qmix.evals.quality.layer_streaming import Scorer
from qmix.evals.quality.token_scores import TokenScores
from qmix.evals.quality.windows import ScoringWindows
from qmix.text.tokenizer import LlamaTokenizer

_BEFORE, _AFTER = 32, 8  # tokens of context
_COUNT = 8


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model expected at a token: the text's probability, and its own first choice."""

    probability: float
    choice: str
    choice_probability: float


@dataclass(frozen=True, kw_only=True)
class WorstToken:
    """A token of the text, the text around it, and what both models expected there.

    Attributes:
        window, position: where it stands.
        kl: KL(reference || model) in nats.
    """

    window: int
    position: int
    kl: float
    before: str
    token: str
    after: str
    reference: Prediction
    model: Prediction


def worst_tokens(
    windows: ScoringWindows,
    scores: TokenScores,
    scorer: Scorer,
    reference: Scorer,
    tokenizer: LlamaTokenizer,
) -> tuple[WorstToken, ...]:
    """The tokens of largest KL, the largest first; none without a reference."""
    if scores.divergences is None:
        return ()
    kl = scores.divergences.kl
    found = []
    for index in kl.topk(min(_COUNT, len(kl))).indices.tolist():
        window, position = int(scores.window[index]), int(scores.position[index])
        ids = windows.ids[window].tolist()
        before = tokenizer.decode(ids[max(0, position - _BEFORE) : position], True)
        found.append(
            WorstToken(
                window=window,
                position=position,
                kl=float(kl[index]),
                before=before,
                token=_continuation(tokenizer, ids, position, position + 1),
                after=_continuation(tokenizer, ids, position + 1, position + 1 + _AFTER),
                reference=_prediction(reference, window, position, ids, tokenizer),
                model=_prediction(scorer, window, position, ids, tokenizer),
            )
        )
    return tuple(found)


def _prediction(
    scorer: Scorer, window: int, position: int, ids: Sequence[int], tokenizer: LlamaTokenizer
) -> Prediction:
    probabilities = scorer.log_probabilities(window, torch.tensor([position - 1]))[0].cpu().exp()
    choice = int(probabilities.argmax())
    chosen = [*ids[:position], choice]
    return Prediction(
        probability=float(probabilities[ids[position]]),
        choice=_continuation(tokenizer, chosen, position, position + 1),
        choice_probability=float(probabilities[choice]),
    )


def _continuation(tokenizer: LlamaTokenizer, ids: Sequence[int], start: int, stop: int) -> str:
    """The text of ids[start:stop] as it goes on from the ids before; a space may begin it."""
    first = max(0, start - _BEFORE)
    known, whole = tokenizer.decode(list(ids[first:start])), tokenizer.decode(list(ids[first:stop]))
    return (
        whole[len(known) :] if whole.startswith(known) else tokenizer.decode(list(ids[start:stop]))
    )
