"""KVCache: rotated keys and values of all layers, appended, viewed and rewound.

Shape letters: B batch, G key-value heads, S new positions, L positions held, d head width.
Knows nothing of attention masks or of tokens.
"""

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import UsageError

_FIRST_CAPACITY = 256


class KVCache:
    """Keys (after RoPE) and values of every layer, [B, G, L, d] each, growing as needed.

    Layers append during a forward pass; `advance` makes the new positions count once all layers
    have written, so an interrupted pass leaves the cache as it was.
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
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        shape = (batch, config.num_key_value_heads, max(capacity, 0), config.head_dim)
        for _ in range(config.num_hidden_layers):
            self._keys.append(torch.empty(shape, dtype=dtype, device=device))
            self._values.append(torch.empty(shape, dtype=dtype, device=device))

    @property
    def batch(self) -> int:
        return self._keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Positions that fit without growing."""
        return self._keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._keys, *self._values))

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write S new positions of one layer; returns views of all L + S positions."""
        end = self.length + keys.shape[2]
        if end > self._keys[layer].shape[2]:
            self._keys[layer] = self._grown(self._keys[layer], end)
            self._values[layer] = self._grown(self._values[layer], end)
        self._keys[layer][:, :, self.length : end] = keys
        self._values[layer][:, :, self.length : end] = values
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def advance(self, positions: int) -> None:
        """Count the positions that every layer has appended."""
        self.length += positions

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, G, L, d] each."""
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(
                "cannot rewind", where="KVCache", expected=f"0 to {self.length}", found=length
            )
        self.length = length

    def _grown(self, old: Tensor, needed: int) -> Tensor:
        capacity = max(needed, 2 * old.shape[2], _FIRST_CAPACITY)
        new = old.new_empty((old.shape[0], old.shape[1], capacity, old.shape[3]))
        new[:, :, : self.length] = old[:, :, : self.length]
        return new
