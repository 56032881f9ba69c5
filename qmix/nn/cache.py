"""KVCache: rotated keys and values of all layers, appended, viewed and rewound.

Knows nothing of tokens, and of attention only that a window never looks back further than W.
Shape letters: see qmix.nn.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.kernels import kv_rows
from qmix.kv_format import KVFormat, check_width
from qmix.quantities import counted

_FIRST_CAPACITY = 256


@runtime_checkable
class Cache(Protocol):
    """What a decoder asks of a cache."""

    @property
    def length(self) -> int: ...
    def append(
        self, layer: int, keys: Tensor, values: Tensor, *, in_order: bool = False
    ) -> tuple[Tensor, Tensor]: ...
    def align_mask(self, mask: Tensor, new: int, *, in_order: bool = False) -> Tensor: ...
    def advance(self, positions: int) -> None: ...


class KVCache:
    """Keys (after RoPE) and values of every layer, [B, G, positions, d] each, growing as needed.

    With a sliding window the cache is a ring: position p lies in slot p mod W, so that it never
    stores more than W positions. Otherwise position p lies in slot p. Keys were rotated by their
    true position, which never changes.

    Layers append during a forward pass; `advance` counts the new positions once all layers have
    appended them, so that an interrupted pass leaves the cache as it was.

    In 8 bits (`kv`) it stores rows of codes, see kernels.kv_rows, and every pass attends to these:
    what a position sees does not depend on whether it was computed in the same pass.

    Indexing and iterating give (keys, values) of each layer, oldest position first, in numbers.
    """

    def __init__(
        self,
        config: MixtralConfig,
        batch: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 0,
        kv: KVFormat = "16",
    ) -> None:
        """An empty cache.

        Args:
            dtype: of the keys and values that are appended.
            capacity: positions that fit before it grows, or W if that is fewer.
            kv: how they are stored.

        Raises:
            UsageError: the model's heads do not fit the format.
        """
        check_width(kv, config.head_dim)
        self.length = 0
        self.window = config.sliding_window
        self.kv, self.dtype = kv, dtype
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        # New positions whose slots hold others that the current pass still reads.
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        slots = self._within_window(max(capacity, 0))
        width, stored = kv_rows.storage(kv, config.head_dim, dtype)
        shape = (batch, config.num_key_value_heads, slots, width)
        for _ in range(config.num_hidden_layers):
            self._keys.append(torch.empty(shape, dtype=stored, device=device))
            self._values.append(torch.empty(shape, dtype=stored, device=device))

    @classmethod
    def from_legacy_cache(
        cls,
        config: MixtralConfig,
        past_key_values: Sequence[tuple[Tensor, Tensor]],
        kv: KVFormat = "16",
    ) -> "KVCache":
        """From (keys, values) of each layer, [B, G, L, d] each, positions 0 .. L - 1.

        That is the format of past_key_values in transformers 4.

        Raises:
            UsageError: not one pair per layer, or of another shape than the model's.
        """
        is_complete = len(past_key_values) == config.num_hidden_layers
        is_complete = is_complete and all(map(_is_pair, past_key_values))
        first = past_key_values[0][0] if is_complete else torch.empty(0)
        batch, length = first.shape[0], first.shape[-2] if first.dim() == 4 else 0
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        if first.dim() != 4 or any(tuple(t.shape) != shape for p in past_key_values for t in p):
            raise UsageError(
                "not this model's keys and values",
                where="past_key_values",
                expected=f"{config.num_hidden_layers} pairs of [batch, "
                f"{config.num_key_value_heads}, positions, {config.head_dim}]",
                found=f"{counted(len(past_key_values), 'pair')}, the first {list(first.shape)}",
            )
        dtype, device = first.dtype, first.device
        cache = cls(config, batch, dtype=dtype, device=device, capacity=length, kv=kv)
        for layer, (keys, values) in enumerate(past_key_values):
            cache.append(layer, keys, values)
        cache.advance(length)
        return cache

    def check_compatible(self, own: "KVCache") -> None:
        """Raise unless compatible with the model's own cache.

        Raises:
            UsageError: other layers, heads, window, rows, dtype or device.
        """
        if str(self) != str(own):
            raise UsageError(
                "the cache does not fit this model and batch",
                where="past_key_values",
                expected=own,
                found=self,
            )

    def __str__(self) -> str:
        batch, heads, _, stored = self._keys[0].shape
        width = kv_rows.head_width(self.kv, stored)
        kind = f"{self.dtype} on {self._keys[0].device}".removeprefix("torch.")
        if self.kv != "16":
            kind = f"{self.kv} of {kind}"
        window = f", window {self.window}" if self.window else ""
        return (
            f"{counted(len(self), 'layer')} [{batch}, {heads}, positions, {width}]{window}, {kind}"
        )

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self._keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Positions that fit without growing."""
        return self._keys[0].shape[2]

    @property
    def stored_length(self) -> int:
        """Positions whose keys and values are stored: all, or the last W."""
        return self._within_window(self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, empty slots included."""
        return sum(t.nbytes for t in (*self._keys, *self._values))

    def append(
        self, layer: int, keys: Tensor, values: Tensor, *, in_order: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Add S new positions [B, G, S, d] to one layer.

        Returns the keys and values that the new positions may attend to: views or copies, oldest
        position first, so that the last S are the new ones; in 8 bits rows of codes. One new
        position on a full ring gets the ring in slot order, since softmax is order-independent;
        `in_order` copies it into order.

        Raises:
            UnsupportedError: gradients are recorded, and codes have none.
        """
        keys, values = kv_rows.encoded(self.kv, keys), kv_rows.encoded(self.kv, values)
        new, end = keys.shape[2], self.length + keys.shape[2]
        self._pending.pop(layer, None)  # left by an interrupted pass
        if self.window is None or end <= self.window:
            if end > self._keys[layer].shape[2]:
                self._keys[layer] = self._grown(self._keys[layer], end)
                self._values[layer] = self._grown(self._values[layer], end)
            self._keys[layer][:, :, self.length : end] = keys
            self._values[layer][:, :, self.length : end] = values
            return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]
        if new == 1:
            # The overwritten position has left the window: an interruption loses nothing.
            slot = self.length % self.window
            self._keys[layer][:, :, slot] = keys[:, :, 0]
            self._values[layer][:, :, slot] = values[:, :, 0]
            if not in_order:
                return self._keys[layer], self._values[layer]
            return self._unrolled(self._keys[layer], end), self._unrolled(self._values[layer], end)
        old_keys, old_values = self.view(layer)
        self._pending[layer] = (
            keys[:, :, -self.window :].clone(),
            values[:, :, -self.window :].clone(),
        )
        return torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)

    def reserve_slot(self) -> tuple[int, int]:
        """Reserve a slot for one new position in every layer's `storage`.

        For a caller that writes into the storage directly. Returns the slot, and how many slots,
        counted from the first, the new position may attend to.
        """
        self._pending.clear()  # left by an interrupted pass
        end = self.length + 1
        self.reserve(end)
        slot = self.length if self.window is None else self.length % self.window
        return slot, self._within_window(end)

    def align_mask(self, mask: Tensor, new: int, *, in_order: bool = False) -> Tensor:
        """Bring the last axis of a mask, L positions, into the order of the keys from `append`.

        Args:
            mask: [..., L]; the last `new` positions are those of this pass.
            in_order: as given to `append`.
        """
        end = self.length + new
        if self.window is None or end <= self.window:
            return mask
        if new == 1:
            mask = mask[..., -self.window :]
            return mask if in_order else mask.roll(end % self.window, -1)
        return mask[..., -(self.stored_length + new) :]

    def advance(self, positions: int) -> None:
        """Count the positions that every layer has appended."""
        end = self.length + positions
        for layer, (keys, values) in self._pending.items():
            assert self.window is not None
            for ring, newest in ((self._keys, keys), (self._values, values)):
                if ring[layer].shape[2] < self.window:
                    ring[layer] = self._grown(ring[layer], self.window)
                first = end - newest.shape[2]
                slots = torch.arange(first, end, device=newest.device) % self.window
                ring[layer][:, :, slots] = newest.to(ring[layer].dtype)
        self._pending.clear()
        self.length = end

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer as they are stored, [B, G, positions, d] each, or
        [B, G, positions, d + 4] in 8 bits; oldest position first.
        """
        if self.window is None or self.length <= self.window:
            return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]
        return (
            self._unrolled(self._keys[layer], self.length),
            self._unrolled(self._values[layer], self.length),
        )

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """The tensors of one layer, [B, G, slots, d] each, or [B, G, slots, d + 4] in 8 bits:
        position p lies in slot p mod slots.
        """
        return self._keys[layer], self._values[layer]

    def reserve(self, positions: int) -> None:
        """Grow at once, so that this many positions, or the last W of them, fit."""
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                if self._within_window(positions) > old.shape[2]:
                    tensors[layer] = self._grown(old, positions)

    def longest_rewindable(self, length: int) -> int:
        """The largest number of positions up to `length` that `rewind` can go back to.

        A full ring has overwritten what a shorter prefix would need: it goes back to all or none.
        """
        if self.window is None or self.length < self.window or length >= self.length:
            return min(length, self.length)
        return 0

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on.

        Raises:
            UsageError: the cache is shorter, or its ring has overwritten earlier positions.
        """
        if not 0 <= length <= self.length:
            raise UsageError(
                "cannot rewind", where="KVCache", expected=f"0 to {self.length}", found=length
            )
        if self.longest_rewindable(length) != length:
            raise UsageError(
                "a rolling cache has overwritten the positions before this one",
                where="KVCache",
                expected=f"0 or {self.length}",
                found=length,
                remedy="Start from an empty cache.",
            )
        self.length = length

    def take(self, other: "KVCache", length: int) -> None:
        """Replace what it holds by the first `length` positions of another cache.

        Args:
            other: of the same model and batch, and `longest_rewindable(length)` of it is `length`.
        """
        assert other.longest_rewindable(length) == length <= other.length
        self.length = 0
        self._pending.clear()
        self.reserve(length)
        for ours, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for mine, found in zip(ours, theirs, strict=True):
                stored = self._within_window(length)
                mine[:, :, :stored] = found[:, :, :stored]
        self.length = length

    def fill(self, length: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Replace what it holds by the first `length` positions of a text.

        Args:
            layers: keys and values of each layer, as `view` gives them of that text or of a longer
                one; of a full ring all of them.
        """
        self.length = 0
        self._pending.clear()
        self.reserve(length)
        stored = self._within_window(length)
        slots = torch.arange(length - stored, length, device=self._keys[0].device)
        slots = slots % self.capacity
        for layer, (keys, values) in enumerate(layers):
            for ring, found in ((self._keys[layer], keys), (self._values[layer], values)):
                ring[:, :, slots] = found[:, :, :stored].to(ring.device)
        self.length = length

    def ahead(self, positions: int) -> "KVCache":
        """The same storage as it will be when it counts some positions more.

        Room for all that is written into it must be reserved before.
        """
        other = KVCache.__new__(KVCache)
        vars(other).update(vars(self))
        other.length += positions
        return other

    def get_seq_length(self) -> int:
        """Positions seen: Hugging Face's name for `length`."""
        return self.length

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self.view(range(len(self))[layer])
        return kv_rows.dequantized(keys, self.dtype), kv_rows.dequantized(values, self.dtype)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(len(self)))

    def __len__(self) -> int:
        return len(self._keys)

    def _unrolled(self, ring: Tensor, end: int) -> Tensor:
        """A full ring, oldest position first, once positions up to `end` have been written."""
        assert self.window is not None
        return ring.roll(-(end % self.window), 2)

    def _within_window(self, positions: int) -> int:
        return positions if self.window is None else min(positions, self.window)

    def _grown(self, old: Tensor, positions: int) -> Tensor:
        capacity = self._within_window(max(positions, 2 * old.shape[2], _FIRST_CAPACITY))
        new = old.new_empty((old.shape[0], old.shape[1], capacity, old.shape[3]))
        new[:, :, : self.length] = old[:, :, : self.length]
        return new


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return False
    return all(isinstance(t, Tensor) for t in pair)
