"""Packed layout for a whole model: which of its weights the GPU kernels can read, and the rest counted.

Knows modules by their classes, and of the packed layout only that it may refuse a weight.
"""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from torch.nn import functional as F

from qmix.errors import UnsupportedError
from qmix.experts.layer_experts import GpuExperts
from qmix.nn.attention import Attention
from qmix.nn.linear import Linear
from qmix.nn.moe import SparseMoeBlock
from qmix.weights.dense import Dense
from qmix.weights.packed import weight as packed
from qmix.weights.packed.packed_shapes import require_silu
from qmix.weights.packed.weight import PackedExperts, PackedWeight


@dataclass
class Placement:
    """How many quantized matrices lie in the packed layout, and why the others do not.

    Attributes:
        packed: matrices.
        refused: matrices by reason; they are dequantized whole before every product.
        apart: layers by reason, whose experts are multiplied one by one, and the host waits for the
            router.
    """

    packed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    apart: Counter[str] = field(default_factory=Counter)

    def pack(self, root: nn.Module) -> None:
        """Bring every quantized matrix below `root` into the packed layout, where it is.

        While it runs the experts of one layer are held twice.
        """
        for module in root.modules():
            if isinstance(module, SparseMoeBlock):
                self._pack_experts(module)
            elif isinstance(module, Attention):
                self._join(module)
        for module in root.modules():
            if isinstance(module, Linear) and not isinstance(module.stored, (Dense, PackedWeight)):
                self._pack_matrix(module)

    @property
    def complete(self) -> bool:
        """Whether every quantized product has its kernel."""
        return not self.refused and not self.apart

    def __str__(self) -> str:
        text = f"{self.packed} of {self.packed + self.refused.total()} quantized matrices in the packed layout"
        if self.refused:
            text += f"; the others are dequantized before every product ({_listed(self.refused)})"
        if self.apart:
            text += f"; layers whose experts are multiplied one by one: {_listed(self.apart)}"
        return text

    def _pack_experts(self, block: SparseMoeBlock) -> None:
        experts = block.stored
        if experts.packed is not None or isinstance(experts[0].w1, Dense):
            return
        try:
            require_silu(fused=block.act is F.silu)
            packed_experts = PackedExperts.pack(experts)
        except UnsupportedError as error:
            self.apart[error.what] += 1
            return
        block.store(GpuExperts(packed_experts))
        self.packed += 3 * len(experts)

    def _join(self, attention: Attention) -> None:
        """q, k and v as one matrix; where they cannot be, each is packed by itself."""
        weights = [m.stored for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        if any(isinstance(weight, (Dense, PackedWeight)) for weight in weights):
            return
        try:
            attention.store_fused_qkv(*packed.pack_joined(weights))
        except UnsupportedError:
            return
        self.packed += len(weights)

    def _pack_matrix(self, module: Linear) -> None:
        try:
            found = packed.pack(module.stored)
        except UnsupportedError as error:
            self.refused[error.what] += 1
            return
        module.store(found)
        self.packed += 1


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
