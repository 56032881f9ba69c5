"""A layer of a decode step in five launches, each result beside torch's on the same device.

A part of qmix.kernels.gpu.self_check: see there. Shape letters: see qmix.kernels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.kernels import pointwise as plain
from qmix.kernels import reference
from qmix.kernels.gpu import fused
from qmix.kernels.trial import Comparison, Draw, inputs_of, weight_of
from qmix.weights.expert import Expert
from qmix.weights.packed import weight as packed
from qmix.weights.packed.layout import PackedMatrix
from qmix.weights.packed.weight import PackedExperts
from qmix.weights.scheme import Scheme

_EPS, _TOKENS, _SHARED, _EXPERTS, _SLOTS, _BEFORE = 1e-5, 3, 1, 4, 8, 3


def comparisons(draw: Draw, dtype: torch.dtype, scheme: Scheme) -> Iterator[Comparison]:
    """Of one layer with weights of a scheme, launch by launch."""
    hidden = inputs_of(scheme)
    x, norm = draw.normal(_TOKENS, hidden, dtype=dtype), draw.normal(hidden, dtype=dtype)
    start = fused.start_norm(x, norm, _EPS)
    yield from _queries(draw, scheme, start, plain.rms_norm(x, norm, _EPS))

    matrix, dense = _matrix(draw, scheme, hidden)
    attended, arrivals = draw.normal(_TOKENS, hidden).half(), fused.counters(hidden, draw.device)
    gate = draw.normal(_EXPERTS, hidden, dtype=dtype) / 16
    found, routes = fused.project_route(attended, matrix, start, norm, _EPS, gate, 2, arrivals)
    total = (x.float() + attended.float() @ dense.T).to(dtype)
    normed = plain.rms_norm(total, norm, _EPS)
    chosen = plain.route(normed.float() @ gate.float().T, 2)
    yield Comparison(f"residual behind a matmul of {scheme}", found.total, total)
    yield Comparison(f"norm behind a matmul of {scheme}", _divided(found), normed)
    yield Comparison(f"router behind a matmul of {scheme}", routes.ids, chosen.ids)

    experts = [
        Expert(*(weight_of(scheme, (hidden, hidden), draw) for _ in range(3)))
        for _ in range(_EXPERTS)
    ]
    table = PackedExperts.pack(experts).table
    added = fused.add_experts(found, routes, table, norm, _EPS, arrivals)
    total = (total.float() + reference.experts(normed.float(), routes, experts, F.silu)).to(dtype)
    yield Comparison(f"residual behind experts of {scheme}", added.total, total)
    wanted = plain.rms_norm(total, norm, _EPS)
    yield Comparison(f"norm behind experts of {scheme}", _divided(added), wanted)


def _queries(
    draw: Draw, scheme: Scheme, start: fused.Normed, normed: Tensor
) -> Iterator[Comparison]:
    """Queries, keys and values behind their product, rotated and in their places."""
    dtype, device, width = normed.dtype, draw.device, fused.HEAD_WIDTH
    heads = normed.shape[1] // width
    rows = (heads + 2 * _SHARED) * width
    matrix, dense = _matrix(draw, scheme, normed.shape[1], rows)
    shape = (2, _TOKENS, _SHARED, _SLOTS, width)
    keys, values = torch.zeros(shape, dtype=dtype, device=device)
    cos, sin = plain.rotary(torch.arange(_SLOTS, device=device)[None], width, 1e4, dtype)
    past = torch.full((_TOKENS,), _BEFORE, dtype=torch.int32, device=device)
    q = fused.rotated_qkv(
        start, matrix, keys, values, cos, sin, past, fused.counters(rows, device),
        heads=heads, dtype=dtype,
    )  # fmt: skip
    new = slice(_BEFORE, _BEFORE + 1)
    by_head = (normed.float() @ dense.T).to(dtype).view(_TOKENS, 1, -1, width).transpose(1, 2)
    turned = plain.apply_rotary(by_head, cos[:, :, new], sin[:, :, new])
    parts = (turned[:, : heads + _SHARED], by_head[:, heads + _SHARED :])
    found = (q.transpose(1, 2), keys[:, :, new], values[:, :, new])
    yield Comparison(f"q, k and v of {scheme}", torch.cat(found, 1), torch.cat(parts, 1))


def _matrix(
    draw: Draw, scheme: Scheme, inputs: int, rows: int | None = None
) -> tuple[PackedMatrix, Tensor]:
    """A random matrix with as many rows as inputs, or `rows`: packed, and in float32."""
    weight = weight_of(scheme, (rows or inputs, inputs), draw)
    matrix = packed.pack(weight).source
    assert isinstance(matrix, PackedMatrix)
    return matrix, weight.dequantize(torch.float32)


def _divided(normed: fused.Normed) -> Tensor:
    """The norm, with the division that the next product does."""
    return normed.weighted.float() * torch.rsqrt(normed.squares.sum(1, keepdim=True))
