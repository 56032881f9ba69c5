"""KVCache: rotated keys and values of all layers, appended, viewed and rewound.

Shape letters: B batch, G key-value heads, S new positions, L positions seen, W window, d head width.
Knows nothing of tokens; of attention only that a window never looks back further than W.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import UsageError

_FIRST_CAPACITY = 256


@runtime_checkable
class Cache(Protocol):
    """What a decoder asks of a cache."""

    @property
    def length(self) -> int: ...
    def append(
        self, layer: int, keys: Tensor, values: Tensor, *, in_order: bool = False
    ) -> tuple[Tensor, Tensor]: ...
    def align_mask(self, columns: Tensor, new: int, *, in_order: bool = False) -> Tensor: ...
    def advance(self, positions: int) -> None: ...


class KVCache:
    """Keys (after RoPE) and values of every layer, [B, G, held, d] each, growing as needed.

    With a sliding window the cache rolls: position p lies in slot p mod W, so that no more than W
    positions are ever held. Otherwise slot and position are one. Keys were rotated by their true
    position, which never changes.

    Layers append during a forward pass; `advance` makes the new positions count once all layers
    have written, so an interrupted pass leaves the cache as it was.

    Indexing and iterating give each layer's (keys, values), oldest position first.
    """

    def __init__(
        self,
        config: MixtralConfig,
        batch: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 0,
    ) -> None:
        self.length = 0
        self.window = config.sliding_window
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._waiting: dict[int, tuple[Tensor, Tensor]] = {}  # overwrite what this pass still reads
        capacity = self._capped(max(capacity, 0))
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        for _ in range(config.num_hidden_layers):
            self._keys.append(torch.empty(shape, dtype=dtype, device=device))
            self._values.append(torch.empty(shape, dtype=dtype, device=device))

    @classmethod
    def of(cls, config: MixtralConfig, pairs: Sequence[tuple[Tensor, Tensor]]) -> "KVCache":
        """From one (keys, values) [B, G, L, d] a layer, positions 0 .. L - 1, as transformers 4 has it.

        Raises:
            UsageError: not one pair a layer, or of another shape than the model's.
        """
        several = len(pairs) == config.num_hidden_layers and all(map(_is_pair, pairs))
        first = pairs[0][0] if several else torch.empty(0)
        batch, length = first.shape[0], first.shape[-2] if first.dim() == 4 else 0
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        if first.dim() != 4 or any(tuple(t.shape) != shape for pair in pairs for t in pair):
            raise UsageError(
                "not this model's keys and values",
                where="past_key_values",
                expected=f"{config.num_hidden_layers} pairs of [batch, "
                f"{config.num_key_value_heads}, positions, {config.head_dim}]",
                found=f"{len(pairs)} pairs, the first {list(first.shape)}",
            )
        cache = cls(config, batch, dtype=first.dtype, device=first.device, capacity=length)
        for layer, (keys, values) in enumerate(pairs):
            cache.append(layer, keys, values)
        cache.advance(length)
        return cache

    def check(self, own: "KVCache") -> None:
        """Refuse to stand for `own`, the cache that a model would make for itself.

        Raises:
            UsageError: made for other layers, heads, window, rows, dtype or device.
        """
        if str(self) != str(own):
            raise UsageError(
                "not this model's and batch's cache",
                where="past_key_values",
                expected=own,
                found=self,
            )

    def __str__(self) -> str:
        batch, heads, _, width = self._keys[0].shape
        kind = f"{self._keys[0].dtype} on {self._keys[0].device}".removeprefix("torch.")
        window = f", window {self.window}" if self.window else ""
        return f"{len(self)} layers [{batch}, {heads}, positions, {width}]{window}, {kind}"

    @property
    def batch(self) -> int:
        return self._keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Positions that fit without growing."""
        return self._keys[0].shape[2]

    @property
    def held(self) -> int:
        """Positions whose keys are still there."""
        return self._capped(self.length)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._keys, *self._values))

    def append(
        self, layer: int, keys: Tensor, values: Tensor, *, in_order: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Add S new positions [B, G, S, d] of one layer.

        Returns what the new positions may look at: views or copies whose last S entries are the new
        ones, oldest first. One new position on a full ring sees the ring as it lies, because a
        softmax does not care; `in_order` copies it into order.
        """
        new, end = keys.shape[2], self.length + keys.shape[2]
        self._waiting.pop(layer, None)  # of a pass that was interrupted
        if self.window is None or end <= self.window:
            if end > self._keys[layer].shape[2]:
                self._keys[layer] = self._grown(self._keys[layer], end)
                self._values[layer] = self._grown(self._values[layer], end)
            self._keys[layer][:, :, self.length : end] = keys
            self._values[layer][:, :, self.length : end] = values
            return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]
        if new == 1:
            # What lay here was seen for the last time one position ago: an interruption costs nothing.
            slot = self.length % self.window
            self._keys[layer][:, :, slot] = keys[:, :, 0]
            self._values[layer][:, :, slot] = values[:, :, 0]
            if not in_order:
                return self._keys[layer], self._values[layer]
            return self._unrolled(self._keys[layer], end), self._unrolled(self._values[layer], end)
        old_keys, old_values = self.view(layer)
        self._waiting[layer] = (
            keys[:, :, -self.window :].clone(),
            values[:, :, -self.window :].clone(),
        )
        return torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)

    def reserve_slot(self) -> tuple[int, int]:
        """Make room for one new position in every layer's `storage`, for who writes it there himself.

        Returns its slot, and how many slots, from the first on, it may look at.
        """
        self._waiting.clear()  # of a pass that was interrupted
        end = self.length + 1
        self.reserve(end)
        slot = self.length if self.window is None else self.length % self.window
        return slot, self._capped(end)

    def align_mask(self, columns: Tensor, new: int, *, in_order: bool = False) -> Tensor:
        """A mask's last axis, over L + S positions, in the order in which `append` shows the keys."""
        end = self.length + new
        if self.window is None or end <= self.window:
            return columns
        if new == 1:
            columns = columns[..., -self.window :]
            return columns if in_order else columns.roll(end % self.window, -1)
        return columns[..., -(self.held + new) :]

    def advance(self, positions: int) -> None:
        """Count the positions that every layer has appended."""
        end = self.length + positions
        for layer, (keys, values) in self._waiting.items():
            assert self.window is not None
            for ring, last in ((self._keys, keys), (self._values, values)):
                if ring[layer].shape[2] < self.window:
                    ring[layer] = self._grown(ring[layer], self.window)
                slots = torch.arange(end - last.shape[2], end, device=last.device) % self.window
                ring[layer][:, :, slots] = last.to(ring[layer].dtype)
        self._waiting.clear()
        self.length = end

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, G, held, d] each, oldest position first."""
        if self.window is None or self.length <= self.window:
            return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]
        return (
            self._unrolled(self._keys[layer], self.length),
            self._unrolled(self._values[layer], self.length),
        )

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """The tensors [B, G, slots, d] behind one layer: column c lies in slot c mod slots."""
        return self._keys[layer], self._values[layer]

    def reserve(self, positions: int) -> None:
        """Have room for so many positions, or for the window, without growing on the way."""
        for kept in (self._keys, self._values):
            for layer, old in enumerate(kept):
                if self._capped(positions) > old.shape[2]:
                    kept[layer] = self._grown(old, positions)

    def longest_rewindable(self, length: int) -> int:
        """The longest prefix of at most `length` positions that `rewind` can go back to.

        A full ring has overwritten what a shorter prefix would need: all of it or nothing.
        """
        if self.window is None or self.length < self.window or length >= self.length:
            return min(length, self.length)
        return 0

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on.

        Raises:
            UsageError: more than the cache has seen, or a rolling cache has overwritten the rest.
        """
        if not 0 <= length <= self.length:
            raise UsageError(
                "cannot rewind", where="KVCache", expected=f"0 to {self.length}", found=length
            )
        if self.longest_rewindable(length) != length:
            raise UsageError(
                "a rolling cache has overwritten what lies before",
                where="KVCache",
                expected=f"0 or {self.length}",
                found=length,
                remedy="Start from an empty cache.",
            )
        self.length = length

    def get_seq_length(self) -> int:
        """Positions seen, as Hugging Face's caches name it."""
        return self.length

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.view(range(len(self))[layer])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.view(layer) for layer in range(len(self)))

    def __len__(self) -> int:
        return len(self._keys)

    def _unrolled(self, ring: Tensor, end: int) -> Tensor:
        """A full ring, oldest position first, when positions up to `end` have been written."""
        assert self.window is not None
        return ring.roll(-(end % self.window), 2)

    def _capped(self, positions: int) -> int:
        return positions if self.window is None else min(positions, self.window)

    def _grown(self, old: Tensor, needed: int) -> Tensor:
        capacity = self._capped(max(needed, 2 * old.shape[2], _FIRST_CAPACITY))
        new = old.new_empty((old.shape[0], old.shape[1], capacity, old.shape[3]))
        new[:, :, : self.length] = old[:, :, : self.length]
        return new


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return False
    return all(isinstance(t, Tensor) for t in pair)
