"""How many rows of a decode step are computed each as if it were alone, to the bit.

That is so on a CPU, where the compiled kernels multiply every weight and take tokens one by one.
Knows modules by their parts.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from qmix import kernels
from qmix.experts.disk_store import DiskStore
from qmix.kernels.cpu.library import DENSE_TOKENS, library
from qmix.nn.cpu_decode import WhyNot
from qmix.nn.decoder import Decoder
from qmix.nn.decoder_layer import DecoderLayer, compiled_whole
from qmix.nn.linear import Linear, is_observed


def exact_rows(model: Decoder, head: Linear) -> int:
    """How many rows; 1 says that a row may round otherwise in company."""
    norm = model.norm.weight
    plain = model.backend == "qmix" and model.attn_implementation == "sdpa"
    if not plain or kernels.overridden() or library().isa is None:
        return 1
    if not norm.is_cpu or norm.dtype != torch.bfloat16 or not norm.is_contiguous():
        return 1
    if is_observed(head) or is_observed(model.norm):
        return 1
    most = min(kernels.tokens_as_alone(head.stored), DENSE_TOKENS)
    for layer in model.layers:
        if most == 1:
            break
        most = min([most, *_of_layer(layer)])
    return most


def _of_layer(layer: nn.Module) -> Iterator[int]:
    """How many rows each of a layer's weights allows."""
    if isinstance(compiled_whole(layer), WhyNot):
        yield 1
        return
    assert isinstance(layer, DecoderLayer)
    block = layer.block_sparse_moe
    yield from (kernels.tokens_as_alone(one.stored) for one in layer.self_attn.projections)
    store = block.offloaded
    if block.act is not F.silu:
        yield 1
    elif isinstance(store, DiskStore):
        yield store.tokens_as_alone
    else:
        weights = block.quantized_weights()
        yield 1 if not weights else DENSE_TOKENS
        yield from (1 if one is None else kernels.tokens_as_alone(one) for one in weights)
