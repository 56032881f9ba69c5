"""Calibration text as windows of token ids: the same windows for the same text on any machine.

Shape letters: W windows, S window. Knows nothing of models or of what the windows are for.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import UsageError


@dataclass(frozen=True, eq=False)
class Calibration:
    """The text that a quantizer measures with.

    Attributes:
        ids: int64 (W, S); every window begins with BOS, as every prompt does.
        text_sha256: of the text's UTF-8 bytes.
    """

    ids: Tensor
    text_sha256: str


def thinned(ids: Tensor, tokens: int) -> Tensor:
    """Windows evenly chosen from `ids` (W, S) that have at most `tokens` tokens together."""
    windows = max(1, tokens // ids.shape[1])
    return ids[:: -(-len(ids) // windows)]


def calibration_windows(
    text: str, encode: Callable[[str], list[int]], *, samples: int, seqlen: int
) -> Calibration:
    """Cut at most `samples` windows of `seqlen` ids, evenly spread over the text, none overlapping.

    A shorter text gives fewer windows; `ids.shape` tells how many.

    Args:
        encode: text -> ids, BOS first.

    Raises:
        UsageError: fewer than one window of text, fewer than 1 sample, or fewer than 2 tokens.
    """
    if samples < 1 or seqlen < 2:
        raise UsageError(
            "too little calibration",
            expected="1 sample of 2 tokens or more",
            found=f"{samples} of {seqlen}",
        )
    bos, *ids = encode(text)
    body = seqlen - 1
    count = min(samples, len(ids) // body)
    if count < 1:
        raise UsageError(
            "the calibration text is too short",
            expected=f"{body} tokens, one window of --seqlen {seqlen}",
            found=len(ids),
            remedy="Give a longer text or lower --seqlen.",
        )
    starts = [index * (len(ids) - body) // max(1, count - 1) for index in range(count)]
    windows = [[bos, *ids[start : start + body]] for start in starts]
    return Calibration(torch.tensor(windows), hashlib.sha256(text.encode()).hexdigest())
