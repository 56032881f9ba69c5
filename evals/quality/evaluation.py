"""Checkpoints scored on the same windows, one layer of one of them in memory at a time.

Knows nothing of averages and of printing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qmix.evals.quality.layer_streaming import Scorer
from qmix.evals.quality.perplexity import Perplexity
from qmix.evals.quality.texts import Text
from qmix.evals.quality.token_scores import TokenScores, token_scores
from qmix.evals.quality.windows import ScoringWindows, open_comparable, text_windows
from qmix.formats import Checkpoint, open_checkpoint
from qmix.kernels.backend import named
from qmix.kv_format import named as named_kv
from qmix.models.options import parse_dtype
from qmix.text.tokenizer import LlamaTokenizer


class Material(Protocol):
    """What is scored."""

    @property
    def text(self) -> Text:
        """All of its text: two tokenizers that encode it alike can be compared."""
        ...

    def windows(
        self, checkpoint: Checkpoint, tokenizer: LlamaTokenizer, ids: list[int]
    ) -> ScoringWindows:
        """Its windows for a model.

        Args:
            ids: of the text.

        Raises:
            UsageError: it does not fit the model.
        """
        ...


@dataclass(frozen=True)
class WholeText:
    """A text, cut into windows; see `windows.text_windows`."""

    text: Text
    window: int | None = None
    stride: int | None = None

    def windows(
        self, checkpoint: Checkpoint, tokenizer: LlamaTokenizer, ids: list[int]
    ) -> ScoringWindows:
        """See Material."""
        return text_windows(checkpoint, tokenizer, ids, self.window, self.stride)


Score = Callable[[ScoringWindows], tuple[TokenScores, ...]]
Share = Callable[[ScoringWindows, Score], tuple[TokenScores, ...]]


def alone(windows: ScoringWindows, score: Score) -> tuple[TokenScores, ...]:
    """Score all windows in this process."""
    return score(windows)


def evaluate(
    directory: Path,
    text: Text,
    *,
    reference: Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    kv: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Score a text with a checkpoint, and compare with a reference checkpoint.

    Args:
        reference: directory of the reference; None compares with nothing.
        window: tokens of a window; by default the model's positions, at most 2048.
        stride: tokens from one window to the next; by default the window.
        dtype, device: as `qmix.LoadOptions`.
        backend: the same; the reference takes the best that there is.
        kv: the same; the reference takes "16".
        progress: called with (layers done, layers in all).

    Raises:
        UsageError: window or stride is out of range, or the text is too short.
        CheckpointError: a checkpoint is damaged, or the two tokenize the text differently.
    """
    windows, (scores,) = score_all(
        [directory],
        WholeText(text, window, stride),
        reference=reference,
        dtype=dtype,
        device=device,
        backend=backend,
        kv=kv,
        progress=progress,
    )
    return Perplexity.of(scores, windows, text.sha256)


def score_all(
    directories: Sequence[Path],
    material: Material,
    *,
    reference: Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    kv: str | None = None,
    share: Share = alone,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[ScoringWindows, tuple[TokenScores, ...]]:
    """Every scored token of the material, by each checkpoint; see `evaluate`.

    Args:
        share: who scores which windows.

    Returns:
        The windows, which are cut for the first checkpoint, and the scores.
    """
    weight_dtype, asked, asked_kv = parse_dtype(dtype), named(backend), named_kv(kv)
    first = open_checkpoint(directories[0])
    tokenizer = LlamaTokenizer.from_pretrained(directories[0])
    ids = tokenizer.encode(material.text.content)
    windows = material.windows(first, tokenizer, ids)
    others = [*directories[1:], *([] if reference is None else [reference])]
    opened = [first, *(open_comparable(path, first, material.text.content, ids) for path in others)]
    base = None if reference is None else opened.pop()

    def score(part: ScoringWindows) -> tuple[TokenScores, ...]:
        return _scored(
            part,
            opened,
            base,
            dtype=weight_dtype,
            device=device,
            computed={"backend": asked, "kv": asked_kv},
            progress=progress,
        )

    return windows, share(windows, score)


def _scored(
    windows: ScoringWindows,
    opened: Sequence[Checkpoint],
    base: Checkpoint | None,
    *,
    dtype: torch.dtype | None,
    device: str | None,
    computed: dict[str, Any],
    progress: Callable[[int, int], None],
) -> tuple[TokenScores, ...]:
    """The scores of some windows by each checkpoint, beside the reference's.

    Args:
        computed: what the reference does not share: the backend, and the form of keys and values.
    """
    everyone = [*opened, *([] if base is None else [base])]
    total, done = sum(each.config.num_hidden_layers for each in everyone), 0

    def run(checkpoint: Checkpoint) -> Scorer:
        nonlocal done
        before, done = done, done + checkpoint.config.num_hidden_layers
        own: dict[str, Any] = {} if checkpoint is base else computed
        scorer = Scorer(checkpoint, windows.ids, dtype=dtype, device=device, **own)
        scorer.run(lambda layers, _: progress(before + layers, total))
        return scorer

    compared = None if base is None else run(base)
    return tuple(token_scores(windows, run(each), compared) for each in opened)
