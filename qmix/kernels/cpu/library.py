"""The compiled CPU kernels as Python functions: tensors and weights in, tensors out.

Shape letters: kernels/__init__. Where there is no compiler there is a Library without functions,
and torch multiplies.
"""

import warnings
from collections.abc import Callable, Sequence
from ctypes import addressof, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from qmix import instruction_sets
from qmix.errors import QmixError
from qmix.kernels.cpu import build
from qmix.kernels.cpu import ctypes_structs as structs
from qmix.kernels.cpu.functions import Functions, torch_threads
from qmix.kernels.cpu.pointers import TokenLayer, expert_of, matrix_of
from qmix.kernels.moe import ExpertTokens, Routes
from qmix.weights.affine import Affine
from qmix.weights.packed.layout import PackedMatrix
from qmix.weights.packed.tile_format import HEADER_BYTES
from qmix.weights.table import Table

DENSE_TOKENS = 16  # the most tokens that `matmul_dense` takes: those of a batch that decodes


@dataclass(frozen=True, eq=False)
class TokenSlot:
    """Where one text's next token goes in the cache of a layer.

    Attributes:
        keys, values: [G, slots, d], bfloat16, or rows of codes [G, slots, d + 4].
        slot: of the token's own keys and values.
        seen: how many slots it attends to, from the first on.
    """

    keys: Tensor
    values: Tensor
    slot: int
    seen: int


@dataclass
class Library:
    """The compiled kernels, or none.

    Every method raises ResourceError if there is no memory for the activations.

    Attributes:
        functions: None if torch multiplies instead.
        fallbacks: matmuls that torch took for that reason.
    """

    functions: Functions | None
    fallbacks: int = 0

    @property
    def isa(self) -> str | None:
        """The instruction set; None if there are no functions."""
        return None if self.functions is None else self.functions.isa

    def matmul(
        self,
        xs: Sequence[Tensor],
        weights: Sequence[Table | Affine],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """Each x [T, K], float32 and contiguous, times its weight [N, K]: [T, N] each, in `dtype`.

        An act-order weight takes its inputs in the order that it stores them. Where `dtype` has 16
        bits, 16-bit integers may stand for x and for the table: an error of 0.008 %. All but the
        portable kernels do so, and take 128 inputs (64 for codes of 8 bits) for zero of which none
        reaches 1.1e-34 (5.5e-35 for NF4).
        """
        sizes = [len(x) * weight.shape[0] for x, weight in zip(xs, weights, strict=True)]
        flat = torch.empty(sum(sizes))
        references: list[Tensor] = []  # what the pointers point to
        matmuls = (structs.Matmul * len(weights))()
        address = flat.data_ptr()
        for matmul, x, weight, size in zip(matmuls, xs, weights, sizes, strict=True):
            matmul.weight = matrix_of(weight, references)
            matmul.x, matmul.y = x.data_ptr(), address
            matmul.tokens, matmul.quantize_activations = len(x), dtype.itemsize == 2
            address += 4 * size
        self._call("matmul", matmuls, len(weights))
        outs = flat.to(dtype).split_with_sizes(sizes)
        return [
            out.view(len(x), weight.shape[0])
            for out, x, weight in zip(outs, xs, weights, strict=True)
        ]

    def matmul_packed(self, x: Tensor, matrix: PackedMatrix, table: Tensor) -> Tensor:
        """x [T, K], float32 and contiguous, times a matrix in the packed layout in host memory.

        Args:
            table: float32 [16], the value of each code; of fewer bits, as if it had four.

        Returns:
            float32 [T, 2, N / 2]: the rows of the low plane, then those of the high one.
        """
        rows, inputs = matrix.shape
        out = torch.empty(len(x), 2, rows // 2)
        start = matrix.blob.data_ptr()
        tiled = structs.TiledMatrix(
            tiles=start + HEADER_BYTES,
            powers=start + 8,
            table=table.data_ptr(),
            byte_rows=rows // 2,
            inputs=inputs,
            tile_inputs=matrix.format.inputs,
            group_inputs=matrix.format.group_inputs,
            bits=matrix.format.bits,
            zeros=not matrix.format.symmetric,
        )
        self._call("matmul_packed", tiled, x, out, len(x))
        return out

    def matmul_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K] times a weight [N, K], both bfloat16 and contiguous: [T, N], summed in float32.

        T is at most DENSE_TOKENS.
        """
        assert 0 < len(x) <= DENSE_TOKENS, x.shape
        rows, inputs = weight.shape
        values, out = x.float(), torch.empty(len(x), rows)
        pointers = (weight.data_ptr(), values.data_ptr(), out.data_ptr())
        self._call("matmul_dense", structs.DenseMatmul(*pointers, rows, inputs, len(x)))
        return out.to(x.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """pointwise.rms_norm over the last axis, all bfloat16 and contiguous."""
        out = torch.empty_like(x)
        width = weight.shape[0]
        self._call("rms_norm", x, weight, out, x.numel() // width, width, eps)
        return out

    def add_experts(
        self,
        x: Tensor,
        experts: Sequence[tuple[Table | Affine, Table | Affine, Table | Affine]],
        through: ExpertTokens,
        out: Tensor,
        *,
        quantize_activations: bool,
        bfloat16_hidden: bool,
    ) -> None:
        """Add `routing_weight * down(silu(gate x) * (up x))` of each expert to `out`, in order.

        Args:
            x: [T, D], float32 and contiguous; `out` likewise.
            experts: gate, up and down of each.
            through: which tokens go through each.
            quantize_activations: whether 16-bit integers may stand for activations and table.
            bfloat16_hidden: whether the inputs of `down` become bfloat16, whose tiles take two
                products on AMX and not three.
        """
        references: list[Tensor] = []  # what the pointers point to
        array = (structs.ExpertMatrices * len(experts))(
            *(expert_of(expert, references) for expert in experts)
        )
        counts = torch.tensor(through.counts)
        tokens, weights = through.tokens.contiguous(), through.routing_weights.contiguous()
        pointers = structs.ExpertTokens(*(part.data_ptr() for part in (counts, tokens, weights)))
        flags = quantize_activations, bfloat16_hidden
        self._call("add_experts", array, len(experts), pointers, x, out, *flags)

    def before_attention(self, layer: TokenLayer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Norm, projections and rotation of x [B, 1, D]: a row of queries, keys and values each.

        All bfloat16 and contiguous; cos and sin [B, 1, 1, d].
        """
        out = torch.empty(len(x), layer.qkv_outputs, dtype=x.dtype)
        self._call("before_attention", layer.pointers, x, len(x), cos, sin, out)
        return out

    def after_attention(
        self, layer: TokenLayer, attended: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Routes]:
        """Output projection, residual, norm and router, and the experts if the layer has them.

        All bfloat16 and contiguous; attended [B, 1, H * d] and x [B, 1, D].

        Returns:
            the residual stream [B, 1, D], the input of the experts [B, D], the logits of the router
            [B, E] and its choice.
        """
        residual, normed = torch.empty_like(x), torch.empty_like(x[:, 0])
        batch, chosen = len(x), layer.pointers.experts_per_token
        logits = torch.empty(batch, layer.pointers.num_experts, dtype=x.dtype)
        routes = Routes(torch.empty(batch, chosen, dtype=torch.int64), torch.empty(batch, chosen))
        outputs = (residual, normed, logits, routes.ids, routes.weights)
        pointers = structs.TokenRoute(*(tensor.data_ptr() for tensor in outputs))
        self._call("after_attention", layer.pointers, pointers, attended, x, batch)
        return residual, normed, logits, routes

    def decode_tokens(
        self,
        layers: Sequence[TokenLayer],
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[TokenSlot],
    ) -> tuple[Tensor, Tensor]:
        """x [B, 1, D] through layers that have their experts, one after another.

        What comes of a row does not depend on the others, as long as matmuls take so few tokens one
        by one (4 bits: 12, with VNNI 16).

        All bfloat16 and contiguous; cos and sin [B, 1, 1, d]. B is at most DENSE_TOKENS.

        Args:
            caches: those of the B rows in the first layer, then those in the second; empty if no
                position came before.

        Returns:
            the residual stream [B, 1, D] and the router logits of each layer [layers, B, E].
        """
        assert all(layer.has_experts for layer in layers)
        assert 0 < len(x) <= DENSE_TOKENS, x.shape
        assert len(caches) in (0, len(layers) * len(x))
        out = x.clone()
        logits = torch.empty(len(layers), len(x), layers[0].pointers.num_experts, dtype=x.dtype)
        rings = (structs.TokenCache * len(caches))(
            *(
                structs.TokenCache(
                    cache.keys.data_ptr(),
                    cache.values.data_ptr(),
                    cache.keys.stride(0),
                    cache.slot,
                    cache.seen,
                    cache.keys.dtype == torch.int8,
                )
                for cache in caches
            )
        )
        step = structs.TokenStep(
            cos.data_ptr(),
            sin.data_ptr(),
            addressof(rings) if caches else None,
            out.data_ptr(),
            logits.data_ptr(),
            len(x),
        )
        pointers = (c_void_p * len(layers))(*(addressof(layer.pointers) for layer in layers))
        self._call("decode_tokens", pointers, len(layers), step)
        return out, logits

    def tokens_as_alone(self, weight: Table | Affine) -> int:
        """Up to how many tokens of 16 bits a matmul computes each as if it were alone."""
        found, references = c_int64(), list[Tensor]()
        self._call("tokens_as_alone", matrix_of(weight, references), found)
        return found.value

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of single tokens to all of k and v: (B, H, 1, d), (B, G, L, d) -> (B, H, 1, d).

        All bfloat16, or k and v rows of codes. In these the positions of a head lie behind one
        another, and the heads, G of each batch entry, equally far apart.
        """
        batch, heads, _, width = q.shape
        q = q.contiguous()
        out = torch.empty_like(q)
        attention = structs.TokenAttention(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            batch * heads,
            batch * k.shape[1],
            width,
            k.shape[2],
            k.stride(1),
            k.dtype == torch.int8,
        )
        self._call("attend", attention)
        return out

    def quantize_rows(self, x: Tensor, rows: Tensor) -> None:
        """kv_rows.quantized of bfloat16 [..., d], into int8 [..., d + 4]; both contiguous."""
        self._call("quantize_rows", x, rows, x.numel() // x.shape[-1], x.shape[-1])

    def read(self, memory: Tensor) -> int:
        """Read a contiguous tensor of whole MiB once, on torch's threads; the xor of its words."""
        found = c_uint64()
        self._call("read", memory, memory.nbytes, found)
        return found.value

    def _call(self, name: str, *arguments: Any) -> None:
        assert self.functions is not None
        self.functions.call(name, *arguments)


class _Once:
    """A function that runs once in a process; threads that call it meanwhile wait."""

    def __init__(self, make: Callable[[], Library]) -> None:
        self._make, self._lock = make, Lock()
        self._made: Library | None = None

    def __call__(self) -> Library:
        made = self._made
        if made is None:
            with self._lock:
                made = self._made = self._made or self._make()
        return made

    def cache_clear(self) -> None:
        """Forget the result, as functools.cache does."""
        self._made = None


@_Once
def library() -> Library:
    """The library of this process; one warning if there is none.

    Raises:
        UsageError: `QMIX_CPU_PATH` names no instruction set, or one that this processor lacks.
    """
    candidates = instruction_sets.candidates()
    if not candidates:
        return Library(None)
    try:
        compiled, name = build.load(candidates)
    except QmixError as error:
        warnings.warn(
            f"4-bit matmuls run on torch, at a tenth of the speed: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return Library(None)
    return Library(Functions(compiled, name, torch_threads()))


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `Library.attend` takes these, each query seeing all keys."""
    batch, groups, positions, width = k.shape
    return (
        q.is_cpu
        and q.shape[2] == 1
        and q.dtype == torch.bfloat16
        and k.dtype == v.dtype
        and k.dtype in (torch.bfloat16, torch.int8)
        and k.stride() == v.stride()
        and k.stride(3) == 1
        and (positions == 1 or k.stride(2) == width)
        and (batch == 1 or k.stride(0) == groups * k.stride(1))
        and library().isa is not None
    )
