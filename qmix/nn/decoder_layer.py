"""A whole layer: attention and experts, each behind its norm.

Knows no bits: one token on a CPU may go through compiled code, of which qmix.nn.cpu_decode decides.
"""

from collections.abc import Callable

from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.kernels.cpu.pointers import TokenLayer
from qmix.nn.attention import Attention, ForwardContext
from qmix.nn.cpu_decode import CompiledLayer, WhyNot, run_layer, why_not_step
from qmix.nn.linear import RMSNorm, is_observed
from qmix.nn.moe import SparseMoeBlock


class DecoderLayer(nn.Module):
    """`h = x + attention(norm x); out = h + experts(norm h)`."""

    def __init__(self, config: MixtralConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.block_sparse_moe = SparseMoeBlock(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._compiled = CompiledLayer()

    def forward(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, D) and the raw router logits (B * S, E)."""
        compiled = self.compiled() if why_not_step(x, context) is None else None
        if isinstance(compiled, TokenLayer):
            return run_layer(compiled, self, x, context)
        x = x + self.self_attn(self.input_layernorm(x), context)
        y, router_logits = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + y, router_logits

    def compiled(self) -> TokenLayer | WhyNot:
        """The layer as compiled code takes it in two calls around attention, or why it does not."""
        return self._compiled.of(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DecoderLayer":
        self._compiled = CompiledLayer()  # let go of weights that are moved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def compiled_whole(layer: nn.Module) -> TokenLayer | WhyNot:
    """A layer as compiled code takes it in one call with the others, or why it does not.

    The layer itself is then never called, so that its own hooks count too.
    """
    if type(layer) is not DecoderLayer:
        return WhyNot.OTHER_CLASS
    return WhyNot.OBSERVED if is_observed(layer) else layer.compiled()
