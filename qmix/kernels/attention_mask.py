"""Which keys each query of an attention sees: causality, a sliding window, padding.

The S queries are the last S of the L columns. Shape letters: see qmix.kernels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys each query may see; the default is plain causality.

    Attributes:
        window: each query sees this many keys, itself included; None: all before it.
        padding_mask: bool (B, L), False at padding; None: no padding.
        attn_mask: (B or 1, H or 1, S, L), replaces causality, window and padding_mask: bool, True
            where a key is seen, or floats that are added to the scores; None: not replaced.
    """

    window: int | None = None
    padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None

    @property
    def is_explicit(self) -> bool:
        """Whether it depends on tensors, and not on the shapes and the window alone."""
        return self.padding_mask is not None or self.attn_mask is not None

    def only_causal(self, keys: int) -> bool:
        """Whether causality alone decides over L keys: no tensor does, the window hides none."""
        return not self.is_explicit and (self.window is None or keys <= self.window)

    def of_heads(self, heads: slice) -> "AttentionMask":
        """The mask over some of the H heads."""
        if self.attn_mask is None or self.attn_mask.shape[1] == 1:
            return self
        return replace(self, attn_mask=self.attn_mask[:, heads])

    def until(self, keys: int) -> "AttentionMask":
        """The mask over the first L keys."""
        if self.padding_mask is None or self.padding_mask.shape[1] == keys:
            return self
        return replace(self, padding_mask=self.padding_mask[:, :keys])

    def in_window(self, keys: int, queries: int) -> tuple["AttentionMask", int]:
        """How many of L keys, the newest ones, any query can see, and the mask over these alone."""
        if self.attn_mask is not None:
            return self, keys
        seen = keys_in_window(keys, queries, self.window)
        if self.padding_mask is None or seen == keys:
            return self, seen
        return replace(self, padding_mask=self.padding_mask[:, -seen:]), seen


CAUSAL = AttentionMask()


def visible(
    queries: int,
    keys: int,
    window: int | None,
    padding_mask: Tensor | None,
    device: torch.device | None = None,
) -> Tensor:
    """Which key each query may see: bool (B or 1, 1, S, L), on the device of `padding_mask`.

    The S queries are the last columns of the L keys. Key j is visible to query i exactly if
    `i - window < j <= i` and `padding_mask[:, j]` (bool (B, L), None: all True).

    Args:
        device: of the result where `padding_mask` is None.
    """
    if padding_mask is not None:
        device = padding_mask.device
    j = torch.arange(keys, device=device)
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    mask = j <= i
    if window is not None:
        mask = mask & (j > i - window)
    if padding_mask is None:
        return mask[None, None]
    return mask[None, None] & padding_mask[:, None, None, :]


def keys_in_window(keys: int, queries: int, window: int | None) -> int:
    """How many of the keys any query sees; older ones are outside every window."""
    return keys if window is None else min(keys, window + queries - 1)
