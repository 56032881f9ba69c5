"""Calibration text -> windows of token ids, the same ones for the same text on any machine.

Knows nothing of models or of what the windows are for. Shape letters: W windows, S window.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import UsageError


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a quantizer sees of the world.

    Attributes:
        ids: int64 (W, S); every window begins with BOS, as every prompt does.
        text_sha256: of the text's UTF-8 bytes.
    """

    ids: Tensor
    text_sha256: str


def cut(text: str, encode: Callable[[str], list[int]], *, samples: int, seqlen: int) -> Calibration:
    """At most `samples` windows of `seqlen` ids, spread evenly over the whole text, none overlapping.

    A text that holds fewer windows gives fewer; `ids.shape` says how many.

    Args:
        encode: text -> ids, BOS first.

    Raises:
        UsageError: fewer than one window of text, or sizes below 1 sample and 2 tokens.
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
