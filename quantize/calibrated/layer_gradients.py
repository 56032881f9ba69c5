"""Second moments of the gradients at a layer, of the loss at the end of the model.

Shape letters: D hidden width, H width of all heads, G width of all keys, F expert width, n tokens.
Knows nothing of how gradients are computed or of how weights are rounded.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.formats.files.shard_writer import ShardWriter
from qmix.formats.files.shards import read_entries, read_entry
from qmix.formats.tensor_spec import TensorSpec
from qmix.quantize.rounding.hessian import Moments
from qmix.weights.dense import Dense


@dataclass(frozen=True, eq=False)
class LayerGradients:
    """Sums of `g g^T` over tokens, float32; g is the gradient with respect to an output.

    Attributes:
        qkv: [H + 2 G, H + 2 G], of the queries, keys and values together.
        attention: [D, D], of the output of o.
        experts: [D, D], of the outputs of all experts, with their routing weights.
    """

    qkv: Tensor
    attention: Tensor
    experts: Tensor

    @classmethod
    def zeros(cls, config: MixtralConfig, device: torch.device) -> "LayerGradients":
        """The sums over no tokens."""
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        widths = (heads * config.head_dim, config.hidden_size, config.hidden_size)
        return cls(*(torch.zeros(width, width, device=device) for width in widths))

    def merge(self, other: "LayerGradients") -> None:
        """Add the sums over other tokens."""
        for field in fields(self):
            getattr(self, field.name).add_(getattr(other, field.name))

    def write(self, path: Path) -> str:
        """Write a file, and return its SHA-256; see `shard_writer.file_digest`."""
        sums = {field.name: getattr(self, field.name).cpu() for field in fields(self)}
        specs = [TensorSpec(name, data.dtype, tuple(data.shape)) for name, data in sums.items()]
        partial, digest = path.with_name(f"{path.name}.writing"), hashlib.sha256()
        partial.unlink(missing_ok=True)
        with ShardWriter(partial, specs, digest) as writer:
            for name, data in sums.items():
                writer.write(name, data)
        partial.rename(path)
        return digest.hexdigest()

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "LayerGradients":
        """What `write` wrote."""
        entries = read_entries(path)
        return cls(
            *(read_entry(field.name, entries[field.name]).to(device) for field in fields(cls))
        )


class InnerGradients:
    """Second moments of the gradients with respect to the outputs of an expert's w1 and w3.

    With a = w1 x and b = w3 x the gradients are those of the expert's output times w2, times
    `b act'(a)` and `act(a)`. Both factors are taken as independent, so that the second moment is
    the product, element by element, of theirs: it needs no gradient of each token.

    Args:
        w1, w2, w3: exact weights [F, D], [D, F], [F, D].
    """

    def __init__(self, w1: Dense, w2: Dense, w3: Dense, act: Callable[[Tensor], Tensor]) -> None:
        self._w1, self._w2, self._w3, self._act = w1, w2, w3, act
        self._slopes = [Moments(w1.shape[0], w1.device, crossed=False) for _ in range(2)]

    def add(self, inputs: Tensor, token_weights: Tensor) -> None:
        """Add the expert's inputs [n, D], with a weight [n] each."""
        gate, up = kernels.linear(inputs, self._w1), kernels.linear(inputs, self._w3)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = self._act(leaf)
            (slope,) = torch.autograd.grad(active.sum(), leaf)
        for moments, factor in zip(self._slopes, (slope * up, active.detach()), strict=True):
            moments.add(factor, token_weights)

    def of_outputs(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The second moments [F, F] for w1 and w3, from those of the expert's output [D, D]."""
        down = self._w2.data.float()
        inner = down.T @ experts @ down
        gate, up = (moments.hessian for moments in self._slopes)
        return gate.mul_(inner), up.mul_(inner)
