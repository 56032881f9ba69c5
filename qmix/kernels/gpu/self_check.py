"""Small inputs through every kernel, each result beside torch's on the same device.

Knows what the kernels are to compute, and nothing of the reasons why a GPU may not. Imports the
launchers, and so triton. Shape letters: see qmix.kernels.
"""

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch.nn import functional as F

from qmix.errors import UnsupportedError
from qmix.kernels import pointwise as plain
from qmix.kernels import reference
from qmix.kernels.attention import reference as plain_attention
from qmix.kernels.attention_mask import visible
from qmix.kernels.gpu import attention, moe, pointwise, self_check_fused
from qmix.kernels.trial import TOKENS, Comparison, Draw, first_beyond, inputs_of, weight_of
from qmix.weights.expert import Expert
from qmix.weights.packed import weight as packed
from qmix.weights.packed.layout import PackedMatrix
from qmix.weights.packed.weight import PackedExperts
from qmix.weights.scheme import Scheme

_EPS = 1e-5


def first_miss(
    device: torch.device, dtype: torch.dtype, scheme: Scheme | None
) -> Comparison | None:
    """The first comparison that misses the bound; None: all results are right.

    Args:
        dtype: of activations.
        scheme: try the kernels that multiply such weights; None: those that read no weights.
    """
    draw = Draw(device)
    comparisons = _layer(draw, dtype) if scheme is None else _weights(draw, dtype, scheme)
    return first_beyond(comparisons)


def _weights(draw: Draw, dtype: torch.dtype, scheme: Scheme) -> Iterator[Comparison]:
    with suppress(UnsupportedError):  # without a packed layout no kernel multiplies such weights
        yield from _matmuls(draw, dtype, scheme)
        yield from _experts(draw, dtype, scheme)
        yield from self_check_fused.comparisons(draw, dtype, scheme)


def _layer(draw: Draw, dtype: torch.dtype) -> Iterator[Comparison]:
    yield from _norms(draw, dtype)
    yield from _rotation(draw, dtype)
    yield from _attention(draw, dtype)


def _matmuls(draw: Draw, dtype: torch.dtype, scheme: Scheme) -> Iterator[Comparison]:
    inputs = inputs_of(scheme)
    weight = weight_of(scheme, (256, inputs), draw)
    matrix = packed.pack(weight).source
    assert isinstance(matrix, PackedMatrix)
    dense = weight.dequantize(torch.float32)
    yield Comparison(f"dequantize of {scheme}", moe.dequantize(matrix, dtype), dense)
    for tokens in TOKENS:
        x = draw.normal(tokens, inputs, dtype=dtype)
        yield Comparison(
            f"matmul of {tokens} tokens and {scheme}", moe.linear(x, matrix), x.float() @ dense.T
        )


def _experts(draw: Draw, dtype: torch.dtype, scheme: Scheme) -> Iterator[Comparison]:
    count, width = 4, inputs_of(scheme)
    experts = [
        Expert(*(weight_of(scheme, (width, width), draw) for _ in range(3))) for _ in range(count)
    ]
    table = PackedExperts.pack(experts).table
    for tokens in TOKENS:
        x, routes = draw.normal(tokens, width, dtype=dtype), draw.routes(tokens, count, 2)
        wanted = reference.experts(x.float(), routes, experts, F.silu)
        found = moe.experts(x, routes, table, 0)
        yield Comparison(f"experts of {tokens} tokens and {scheme}", found, wanted)


def _norms(draw: Draw, dtype: torch.dtype) -> Iterator[Comparison]:
    tokens, hidden = 4, 256
    x, weight = draw.normal(tokens, hidden, dtype=dtype), draw.normal(hidden, dtype=dtype)
    partials = draw.normal(2, tokens, hidden)
    gate = draw.normal(8, hidden, dtype=dtype) / 16
    total = (x.float() + partials.sum(0).to(dtype).float()).to(dtype)
    normed = plain.rms_norm(total, weight, _EPS)
    routed = pointwise.residual_norm_route(x, partials, weight, _EPS, gate, 2)
    chosen = plain.route(routed.logits, 2)
    yield Comparison("norm", pointwise.rms_norm(x, weight, _EPS), plain.rms_norm(x, weight, _EPS))
    yield Comparison("residual", routed.total, total)
    yield Comparison("norm of the residual", routed.normed, normed)
    yield Comparison("router", routed.logits, normed.float() @ gate.float().T)
    yield Comparison("choice of experts", routed.routes.ids, chosen.ids)
    yield Comparison("weights of experts", routed.routes.weights, chosen.weights)


def _rotation(draw: Draw, dtype: torch.dtype) -> Iterator[Comparison]:
    """Rotary embedding, by itself and with the write of keys and values into a cache."""
    tokens, heads, shared, width, slots, before = 4, 4, 2, 64, 32, 3
    positions = torch.arange(slots, device=draw.device)[None]
    cos, sin = plain.rotary(positions, width, 1e4, dtype)
    qkv = draw.normal(1, tokens, (heads + 2 * shared) * width)
    keys, values = torch.zeros(2, 1, shared, slots, width, dtype=dtype, device=draw.device)
    past = torch.full((1,), before, dtype=torch.int32, device=draw.device)
    q = pointwise.rotate_store(qkv, keys, values, cos, sin, past, heads=heads, dtype=dtype)
    new = slice(before, before + tokens)
    by_head = qkv.to(dtype).view(1, tokens, -1, width).transpose(1, 2)
    cos, sin = cos[:, :, new], sin[:, :, new]
    turned = plain.apply_rotary(by_head, cos, sin)
    yield Comparison("rotation", pointwise.apply_rotary(by_head, cos, sin), turned)
    yield Comparison("queries", q.transpose(1, 2), turned[:, :heads])
    yield Comparison("keys", keys[:, :, new], turned[:, heads : heads + shared])
    yield Comparison("values", values[:, :, new], by_head[:, heads + shared :])


def _attention(draw: Draw, dtype: torch.dtype) -> Iterator[Comparison]:
    heads, shared, slots, width = 4, 2, 200, 64
    keys, values = (draw.normal(1, shared, slots, width, dtype=dtype) for _ in range(2))
    for queries in (1, 20):
        q = draw.normal(1, queries, heads, width, dtype=dtype)
        past = torch.full((1,), slots - queries, dtype=torch.int32, device=draw.device)
        found = attention.attend_cached(q, keys, values, past).transpose(1, 2)
        seen = visible(queries, slots, None, None, draw.device)
        wanted = plain_attention(q.transpose(1, 2), keys, values, seen)
        yield Comparison(f"attention of {queries} queries", found, wanted)
    arrivals = torch.zeros(shared, dtype=torch.int32, device=draw.device)
    merged = attention.attend_cached(q[:, -1:], keys, values, past + 19, arrivals=arrivals)
    yield Comparison(
        "attention merged by its last split", merged.transpose(1, 2), wanted[:, :, -1:]
    )
