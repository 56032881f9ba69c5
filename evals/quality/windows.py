"""A text as windows of token ids that are scored, and the models that may be scored beside it.

Shape letters: W windows, S window. Knows nothing of what a score is.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmix.errors import CheckpointError, UsageError
from qmix.formats import Checkpoint, open_checkpoint
from qmix.text.tokenizer import LlamaTokenizer

WINDOW = 2048


@dataclass(frozen=True, eq=False)
class ScoringWindows:
    """A tokenized text, cut into windows.

    Attributes:
        ids: (W, S).
        scored: whether the id at a position is scored as the target of those before it, bool
            (W, S); never at position 0.
        protocol: how the text was cut, in words.
    """

    ids: Tensor
    scored: Tensor
    protocol: str


def scoring_windows(
    ids: list[int], window: int, stride: int, added: str = "BOS at the text's start only"
) -> ScoringWindows:
    """Cut windows of `window` ids every `stride`. Each target is scored once; the tail is dropped.

    With `stride == window` this is the protocol of the GPTQ papers: one BOS at the very start,
    non-overlapping windows, and the mean over the window - 1 shifted targets of each.

    Args:
        added: what the tokenizer put around the text, in words.

    Raises:
        UsageError: fewer than two ids.
    """
    if len(ids) < 2:
        raise UsageError("the text is too short to score", expected="2 tokens", found=len(ids))
    if len(ids) < window:
        words = f"one window of {len(ids)}, the whole text (shorter than {window}), {added}"
        return ScoringWindows(torch.tensor([ids]), _from(1, 1, len(ids)), words)
    starts = range(0, len(ids) - window + 1, stride)
    dropped = len(ids) - (starts[-1] + window)
    kind = "non-overlapping" if stride == window else f"stride {stride}, each token scored once"
    words = f"{len(starts)} windows of {window}, {kind}, {added}, tail of {dropped} tokens dropped"
    rows = torch.tensor([ids[start : start + window] for start in starts])
    scored = _from(1 if stride == window else window - stride, *rows.shape)
    scored[0, 1:] = True
    return ScoringWindows(rows, scored, words)


def _from(first: int, windows: int, size: int) -> Tensor:
    """A mask (windows, size) of all positions from `first` on."""
    return (torch.arange(size) >= first).repeat(windows, 1)


def whole_windows(ids: Tensor, protocol: str) -> ScoringWindows:
    """Windows (W, S) that are given, all but the first id of each scored."""
    return ScoringWindows(ids, _from(1, *ids.shape), protocol)


def text_windows(
    checkpoint: Checkpoint,
    tokenizer: LlamaTokenizer,
    ids: list[int],
    size: int | None,
    stride: int | None = None,
) -> ScoringWindows:
    """The windows of a text for a model; see `scoring_windows`.

    Args:
        ids: the text's.
        size: tokens of a window; None: the model's positions, at most 2048.
        stride: tokens from one window to the next; None: the window.

    Raises:
        UsageError: window or stride is out of range, or the text is too short.
    """
    positions = checkpoint.config.max_position_embeddings
    size = min(WINDOW, positions) if size is None else size
    check_range("ctx", size, 2, positions)
    step = size if stride is None else stride
    check_range("stride", step, 1, size)
    return scoring_windows(ids, size, step, added_tokens(tokenizer))


def added_tokens(tokenizer: LlamaTokenizer) -> str:
    """What a tokenizer puts around a text, in words."""
    alone, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    at = next(n for n in range(len(whole)) if whole[n : n + len(alone)] == alone)
    before, after = whole[:at], whole[at + len(alone) :]
    words = "nothing in front"
    if before == [tokenizer.bos_token_id]:
        words = "BOS at the text's start only"
    elif before:
        words = f"{_named(tokenizer, before)} at the text's start only"
    return f"{words}, {_named(tokenizer, after)} at its end" if after else words


def _named(tokenizer: LlamaTokenizer, ids: list[int]) -> str:
    return " ".join(f"{tokenizer.convert_ids_to_tokens(index)} ({index})" for index in ids)


def open_comparable(
    directory: Path, checkpoint: Checkpoint, content: str, ids: list[int]
) -> Checkpoint:
    """Open a checkpoint to compare with another: it has the same tokenizer and vocabulary.

    Args:
        ids: what `checkpoint` makes of the text.

    Raises:
        CheckpointError: it is damaged, or they differ.
    """
    if LlamaTokenizer.from_pretrained(directory).encode(content) != ids:
        raise CheckpointError(
            "the two checkpoints tokenize the text differently",
            where=str(directory),
            remedy="Give the checkpoint that the 4-bit one was made from.",
        )
    opened = open_checkpoint(directory)
    if opened.config.vocab_size != checkpoint.config.vocab_size:
        raise CheckpointError(
            "the two checkpoints have different vocabularies",
            where=str(directory),
            expected=checkpoint.config.vocab_size,
            found=opened.config.vocab_size,
        )
    return opened


def check_range(name: str, value: int, low: int, high: int) -> None:
    """
    Raises:
        UsageError: the value is outside [low, high].
    """
    if not low <= value <= high:
        raise UsageError("out of range", where=name, expected=f"{low} to {high}", found=value)
