"""Brings a whole model into the packed layout that the GPU kernels read, and counts what cannot be.

Which matrices are packed together is decided by `weights.packed.packed_shapes`. Knows modules by
their classes.
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
class Packer:
    """Packs models, and counts.

    Attributes:
        packed: how many quantized matrices it has packed.
        refused: matrices without a packed layout, by reason: they are dequantized whole before
            every matmul.
        separate: layers whose experts are not packed together, by reason: their experts are
            multiplied one by one, and the host waits for the router.
    """

    packed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    separate: Counter[str] = field(default_factory=Counter)

    def pack(self, root: nn.Module, *, experts: bool = True) -> None:
        """Bring every quantized matrix below `root` into the packed layout, on its own device.

        Meanwhile one expert is in memory twice. A router stays as it is: what its few outputs need
        is dequantized once for all steps.

        Args:
            experts: False leaves them as they are.
        """
        routers = set()
        for module in root.modules():
            if isinstance(module, SparseMoeBlock):
                routers.add(module.gate)
                if experts:
                    self._pack_experts(module)
            elif isinstance(module, Attention):
                self._pack_qkv(module)
        for module in root.modules():
            if isinstance(module, Linear) and module not in routers:
                self._pack_matrix(module)

    def forget(self) -> None:
        """Count from the beginning: the model is filled anew."""
        self.packed = 0
        self.refused.clear()
        self.separate.clear()

    @property
    def complete(self) -> bool:
        """Whether every quantized matmul has its kernel."""
        return not self.refused and not self.separate

    def __str__(self) -> str:
        total = self.packed + self.refused.total()
        text = f"{self.packed} of {total} quantized matrices in the packed layout"
        if self.refused:
            text += f"; the others are dequantized before every matmul ({_counted(self.refused)})"
        if self.separate:
            text += f"; layers whose experts are multiplied one by one: {_counted(self.separate)}"
        return text

    def _pack_experts(self, block: SparseMoeBlock) -> None:
        experts = block.stored
        if experts.packed is not None or isinstance(experts[0].w1, Dense):
            return
        try:
            require_silu(fused=block.act is F.silu)
            packed_experts = PackedExperts.pack(experts, block.release_expert)
        except UnsupportedError as error:
            self.separate[error.what] += 1
            return
        block.store(GpuExperts(packed_experts))
        self.packed += 3 * len(experts)

    def _pack_qkv(self, attention: Attention) -> None:
        """Pack q, k and v as one matrix; if they cannot be joined, each is packed by itself."""
        weights = [m.stored for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        if any(isinstance(weight, (Dense, PackedWeight)) for weight in weights):
            return
        try:
            attention.store_fused_qkv(*packed.pack_joined(weights))
        except UnsupportedError:
            return
        self.packed += len(weights)

    def _pack_matrix(self, module: Linear) -> None:
        if isinstance(module.stored, (Dense, PackedWeight)):
            return
        try:
            packed_weight = packed.pack(module.stored)
        except UnsupportedError as error:
            self.refused[error.what] += 1
            return
        module.store(packed_weight)
        self.packed += 1


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
