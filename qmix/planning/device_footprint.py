"""The bytes of a model's parts on a GPU, with quantized weights in the packed layout.

Which matrices are packed together, and how, is decided by `weights.packed.packed_shapes`, for the
loader and for plans alike. Knows no torch and no tensors.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from qmix.errors import UnsupportedError
from qmix.formats.names import TensorKind
from qmix.planning.footprint import Footprint, Widening, with_tied_head
from qmix.planning.stored_model import StoredModel, StoredWeight
from qmix.weights.blob import PAGE_BYTES, aligned
from qmix.weights.packed.bit_slices import SLICES
from qmix.weights.packed.packed_shapes import (
    expert_format,
    joined,
    matrix_format,
    padded,
    require_silu,
    table_formats,
)


@dataclass(frozen=True)
class _Bytes:
    """What weights take of each memory."""

    device: int = 0
    host: int = 0

    def __add__(self, other: "_Bytes") -> "_Bytes":
        return _Bytes(self.device + other.device, self.host + other.host)


def on_device(model: StoredModel) -> Footprint:
    """The footprint on a GPU."""
    kinds: dict[TensorKind, _Bytes] = defaultdict(_Bytes)
    attention: dict[int | None, list[StoredWeight]] = defaultdict(list)
    for weight in model.weights:
        if weight.tensor.kind == "attention":
            attention[weight.tensor.layer].append(weight)
        elif weight.tensor.kind != "expert":
            kinds[weight.tensor.kind] += _single(weight, model.item)
    for weights in attention.values():
        kinds["attention"] += _attention(weights, model.item)
    experts, reason = _experts(model)
    device = with_tied_head(model, {kind: nbytes.device for kind, nbytes in kinds.items()})
    return Footprint(
        tuple(nbytes.device for nbytes in experts),
        aligned(max(nbytes.device for nbytes in experts), PAGE_BYTES),
        device,
        sum(nbytes.host for nbytes in (*experts, *kinds.values())),
        reason,
        _widened(model),
    )


def _widened(model: StoredModel) -> Widening | None:
    """Of integers of 2, 3, 5 and 6 bits where the packed layout has no slices for their shape."""
    bits: set[tuple[int, int]] = set()
    nbytes = 0
    for weight in model.weights:
        stored = weight.scheme.bits
        if not weight.tensor.linear or stored not in SLICES:
            continue
        try:
            packed = matrix_format(padded(weight.spec)).bits
        except UnsupportedError:
            continue
        if packed > stored:
            bits.add((stored, packed))
            nbytes += weight.elements * (packed - stored) // 8
    return Widening(tuple(sorted(bits)), nbytes) if bits else None


def _single(weight: StoredWeight, item: int) -> _Bytes:
    """A weight by itself: packed if it is a linear layer's and can be."""
    if weight.tensor.linear and weight.tensor.kind != "router":
        try:
            spec = padded(weight.spec)
            nbytes = matrix_format(spec).matrix_bytes(spec.shape)
        except UnsupportedError:
            pass
        else:
            return _Bytes(nbytes, weight.scale_bytes)
    return _Bytes(weight.memory_bytes(item))


def _singles(weights: Iterable[StoredWeight], item: int) -> _Bytes:
    return sum((_single(weight, item) for weight in weights), _Bytes())


def _attention(weights: list[StoredWeight], item: int) -> _Bytes:
    """q, k, v and o of a layer, the first three as one matrix if they can be joined."""
    *qkv, o = weights
    try:
        whole = joined([weight.spec for weight in qkv])
        nbytes = matrix_format(whole).matrix_bytes(whole.shape)
    except UnsupportedError:
        return _singles(weights, item)
    return _Bytes(nbytes, sum(weight.scale_bytes for weight in qkv)) + _single(o, item)


def _experts(model: StoredModel) -> tuple[list[_Bytes], str | None]:
    """Each expert by layer * E + expert, and why slots cannot hold the experts."""
    per_layer = model.config.num_local_experts
    sizes: list[_Bytes] = []
    reasons: list[str] = []
    for first in range(0, model.experts, per_layer):
        experts = model.expert_weights[first : first + per_layer]
        try:
            require_silu(fused=model.config.hidden_act in ("silu", "swish"))
            formats = table_formats(
                [[expert_format(*(w.spec for w in weights)) for weights in experts]]
            )
        except UnsupportedError as error:
            reasons.append(error.what)
            sizes += [_singles(weights, model.item) for weights in experts]
            continue
        sizes += [
            _Bytes(of.nbytes, sum(w.scale_bytes for w in weights))
            for of, weights in zip(formats, experts, strict=True)
        ]
    return sizes, reasons[0] if reasons else None
