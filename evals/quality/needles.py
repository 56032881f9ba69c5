"""Needles in a haystack: a number that a text states somewhere, and is asked for at its end.

The number counts as found if each of its ids is the likeliest, which is what a greedy reply would
be made of. Shape letters: W windows, S window. Knows nothing of models.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qmix.errors import UsageError
from qmix.evals.quality.texts import Text
from qmix.evals.quality.token_scores import TokenScores
from qmix.evals.quality.windows import WINDOW, ScoringWindows, check_range
from qmix.formats import Checkpoint
from qmix.quantities import counted
from qmix.text.tokenizer import LlamaTokenizer

DEPTHS = tuple(step / 10 for step in range(11))
_PLACES = ("Lisbon", "Oslo", "Quito", "Hanoi", "Tunis", "Perth", "Kyoto", "Minsk", "Accra", "Lima")
_NEEDLE = "\nThe secret number of {place} is {number}.\n"
_QUESTION = "\n\nWhat is the secret number of {place}? The secret number of {place} is"


@dataclass(frozen=True)
class Needles:
    """Windows of a text with a needle in each; a Material of `evaluation`.

    Attributes:
        trials: windows a depth, each of another stretch of the text, with another number.
        size: ids of a window; None: the model's positions, at most 2048.
    """

    text: Text
    trials: int
    size: int | None = None

    def windows(
        self, checkpoint: Checkpoint, tokenizer: LlamaTokenizer, ids: list[int]
    ) -> ScoringWindows:
        """`trials` windows for each of DEPTHS, in their order; the number's ids are scored.

        Raises:
            UsageError: the window is out of range, or the text shorter than a window.
        """
        positions = checkpoint.config.max_position_embeddings
        size = min(WINDOW, positions) if self.size is None else self.size
        check_range("ctx", size, 2, positions)
        if len(ids) < size:
            raise UsageError(
                "the text is shorter than a window", where="data", expected=size, found=len(ids)
            )
        drawn = random.Random(0)
        rows = [
            self._row(tokenizer, ids, size, depth, trial, drawn)
            for depth in DEPTHS
            for trial in range(self.trials)
        ]
        words = (
            f"a number in {size} tokens at {counted(len(DEPTHS), 'depth')}, "
            f"{counted(self.trials, 'time')} each, found if greedy decoding would write it"
        )
        scored = [[False] * (size - answer) + [True] * answer for _, answer in rows]
        return ScoringWindows(torch.tensor([row for row, _ in rows]), torch.tensor(scored), words)

    def _row(
        self,
        tokenizer: LlamaTokenizer,
        ids: list[int],
        size: int,
        depth: float,
        trial: int,
        drawn: random.Random,
    ) -> tuple[list[int], int]:
        """The ids of a window, and how many of them are the number at its end."""
        place, number = drawn.choice(_PLACES), str(drawn.randrange(10_000, 100_000))
        begin = ids[:1] if ids[0] == tokenizer.bos_token_id else []
        needle, question, answer = (
            tokenizer.encode(part.format(place=place, number=number), add_special_tokens=False)
            for part in (_NEEDLE, _QUESTION, number)
        )
        hay = size - len(begin) - len(needle) - len(question) - len(answer)
        if hay < 1:
            raise UsageError(
                "no room for the text around the needle",
                where="ctx",
                expected=f"over {size - hay}",
                found=size,
            )
        start = len(begin) + trial * (len(ids) - len(begin) - hay) // self.trials
        stretch = ids[start : start + hay]
        at = _word_start(tokenizer, stretch, round(depth * hay))
        row = [*begin, *stretch[:at], *needle, *stretch[at:], *question, *answer]
        return row, len(answer)

    def result(self, scores: TokenScores, protocol: str) -> "NeedleResult":
        """What a model found; `scores` are of `windows`."""
        depths = []
        for number, depth in enumerate(DEPTHS):
            first = number * self.trials
            inside = [scores.window == index for index in range(first, first + self.trials)]
            found = sum(bool(scores.greedy[each].all()) for each in inside)
            losses = [float(scores.losses[each].double().sum()) for each in inside]
            depths.append(
                DepthScore(
                    depth=depth,
                    trials=self.trials,
                    found=found,
                    log_likelihood=-sum(losses) / self.trials,
                )
            )
        return NeedleResult(protocol, self.text.sha256, tuple(depths))


@dataclass(frozen=True, kw_only=True)
class DepthScore:
    """The needles at one depth.

    Attributes:
        depth: share of the text that stands before them.
        log_likelihood: of a number in nats, the mean.
    """

    depth: float
    trials: int
    found: int
    log_likelihood: float


@dataclass(frozen=True)
class NeedleResult:
    """What one model found."""

    protocol: str
    text_sha256: str
    depths: Sequence[DepthScore]

    def to_dict(self) -> dict[str, Any]:
        """The figures as a JSON document."""
        return asdict(self)


def _word_start(tokenizer: LlamaTokenizer, ids: Sequence[int], at: int) -> int:
    """The nearest place at or before `at` where a word begins."""
    texts = tokenizer.pieces.texts
    while 0 < at < len(ids) and not texts[ids[at]].startswith((" ", "\n")):
        at -= 1
    return at
