"""The compiled products as Python functions: weights in, pointers through, float32 out.

`QMIX_CPU_KERNELS` chooses among the instruction sets of one library for tests and for comparisons: `vnni`,
`avx512`, `avx2` or `portable`, or `torch` for none of them. Without it the best that the processor has is taken.

Shape letters: T tokens, N outputs, K inputs.
"""

import ctypes
import os
import warnings
from collections.abc import Sequence
from ctypes import POINTER, addressof, byref, c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from qmix.errors import QmixError, ResourceError, UsageError
from qmix.kernels.cpu import build
from qmix.kernels.cpu.ctypes_structs import (
    Attended,
    DenseMatmul,
    Matmul,
    MixedExpert,
    Packed,
    TokenCache,
    TokenLayer,
    TokenLayerFields,
    TokenRoute,
    TokenStep,
    expert_of,
    matrix_of,
)
from qmix.kernels.moe import Routes
from qmix.weights.integers import Int4
from qmix.weights.nf4 import NF4
from qmix.weights.packed.layout import PackedMatrix
from qmix.weights.packed.tile_format import HEADER_BYTES

VARIABLE = "QMIX_CPU_KERNELS"
ISAS = ("portable", "avx2", "avx512", "vnni")  # their numbers in the source

DENSE_TOKENS = 2  # at most, of a compiled product with a weight in bfloat16
_FORKED = 0x40  # Linux' PF_FORKNOEXEC


@dataclass
class Library:
    """The compiled products, or why there are none.

    Attributes:
        isa: which of ISAS; None: there are none, every product takes torch's tiles.
        fallbacks: products that did so.
    """

    isa: str | None
    functions: ctypes.CDLL | None = None
    fork: int | None = None
    process: int = field(default_factory=os.getpid)
    fallbacks: int = 0

    def matmul(
        self,
        xs: Sequence[Tensor],
        weights: Sequence[NF4 | Int4],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """Each x [T, K], float32 and contiguous, times its weight [N, K]: [T, N] each, in `dtype`.

        An act-order weight takes its inputs in the order that it stores them.

        Outputs of 16 bits allow 16-bit integers to stand for x and for the table: an error of 0.007 %.

        Raises:
            ResourceError: no memory for the arranged activations.
        """
        assert self.functions is not None
        assert self.isa is not None
        sizes = [len(x) * weight.shape[0] for x, weight in zip(xs, weights, strict=True)]
        flat = torch.empty(sum(sizes))
        held: list[Tensor] = []  # what the pointers point to
        products = (Matmul * len(weights))()
        at = flat.data_ptr()
        for product, x, weight, size in zip(products, xs, weights, sizes, strict=True):
            product.weight = matrix_of(weight, held)
            product.x, product.y = x.data_ptr(), at
            product.tokens, product.rounded = len(x), dtype.itemsize == 2
            at += 4 * size
        failed = self.functions.qmix_matmul(products, len(weights), *self._ways())
        if failed:
            raise ResourceError("no memory for a product's activations", found=tuple(xs[0].shape))
        parts = flat.to(dtype).split_with_sizes(sizes)
        return [
            part.view(len(x), weight.shape[0])
            for part, x, weight in zip(parts, xs, weights, strict=True)
        ]

    def matmul_packed(self, x: Tensor, matrix: PackedMatrix, table: Tensor) -> Tensor:
        """x [T, K], float32 and contiguous, times a matrix in the packed layout in host memory.

        Args:
            table: float32 [16], the value of each code as it is packed, 8 being Int4's zero.
        Returns:
            float32 [T, 2, N / 2]: the low plane's rows, then the high plane's.
        Raises:
            ResourceError: no memory for the arranged activations.
        """
        assert self.functions is not None
        assert self.isa is not None
        rows, inputs = matrix.shape
        out = torch.empty(len(x), 2, rows // 2)
        start = matrix.blob.data_ptr()
        packed = Packed(
            tiles=start + HEADER_BYTES,
            powers=start + 8,
            table=table.data_ptr(),
            byte_rows=rows // 2,
            inputs=inputs,
            tile_inputs=matrix.format.inputs,
            zeros=not matrix.format.symmetric,
        )
        failed = self.functions.qmix_matmul_packed(
            byref(packed),
            x.data_ptr(),
            out.data_ptr(),
            len(x),
            *self._ways(),
        )
        if failed:
            raise ResourceError("no memory for a product's activations", found=tuple(x.shape))
        return out

    def add_experts(
        self,
        x: Tensor,
        experts: Sequence[tuple[NF4 | Int4, NF4 | Int4, NF4 | Int4]],
        shares: Sequence[float],
        out: Tensor,
        *,
        rounded: bool,
    ) -> None:
        """Add `share * down(silu(gate x) * (up x))` of each (gate, up, down) to `out`, in this order.

        Args:
            x: of one token, [1, K], float32 and contiguous. out: [1, D], likewise.
            rounded: as outputs of 16 bits allow.

        Raises:
            ResourceError: no memory for the activations.
        """
        assert self.functions is not None
        assert self.isa is not None
        held: list[Tensor] = []  # what the pointers point to
        mixed = (MixedExpert * len(experts))(*(expert_of(expert, held) for expert in experts))
        for entry, share in zip(mixed, shares, strict=True):
            entry.share = share
        failed = self.functions.qmix_moe_token(
            mixed, len(experts), x.data_ptr(), out.data_ptr(), rounded, *self._ways()
        )
        if failed:
            raise ResourceError("no memory for an expert's activations", found=tuple(x.shape))

    def before_attention(self, layer: "TokenLayer", x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Norm, projections and rotation of x [1, 1, D]: queries, keys and values one after another.

        All bfloat16 and contiguous; cos and sin [1, 1, 1, d].
        """
        assert self.functions is not None
        out = torch.empty(layer.outputs, dtype=x.dtype)
        failed = self.functions.qmix_before_attention(
            byref(layer.fields),
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            *self._ways(),
        )
        if failed:
            raise ResourceError("no memory for a layer's activations", found=tuple(x.shape))
        return out

    def after_attention(
        self, layer: "TokenLayer", attended: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Routes]:
        """Output projection, residual, norm and router, and the experts if the layer is whole.

        All bfloat16 and contiguous; attended [1, 1, H * d] and x [1, 1, D].

        Returns:
            the residual stream [1, 1, D], the experts' input [1, D], the router's logits [1, E] and its choice.
        """
        assert self.functions is not None
        residual, normed = torch.empty_like(x), torch.empty_like(x[0])
        logits = torch.empty(1, layer.fields.experts, dtype=x.dtype)
        ids = torch.empty(1, layer.fields.chosen, dtype=torch.int64)
        shares = torch.empty(1, layer.fields.chosen)
        to = TokenRoute(*(part.data_ptr() for part in (residual, normed, logits, ids, shares)))
        failed = self.functions.qmix_after_attention(
            byref(layer.fields), byref(to), attended.data_ptr(), x.data_ptr(), *self._ways()
        )
        if failed:
            raise ResourceError("no memory for a layer's activations", found=tuple(x.shape))
        return residual, normed, logits, Routes(ids, shares)

    def decode_token(
        self,
        layers: Sequence[TokenLayer],
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        *,
        slot: int,
        seen: int,
    ) -> tuple[Tensor, Tensor]:
        """x [1, 1, D] through whole layers, one after another.

        All bfloat16 and contiguous; cos and sin [1, 1, 1, d].

        Args:
            caches: each layer's keys and values [1, G, slots, d], or none where nothing was before.
            slot, seen: where the token's own go, and how many slots it sees, from the first on.

        Returns:
            the residual stream [1, 1, D] and each layer's router logits [layers, E].
        """
        assert self.functions is not None
        assert all(layer.has_experts for layer in layers)
        out = x.clone()
        logits = torch.empty(len(layers), layers[0].fields.experts, dtype=x.dtype)
        rings = (TokenCache * len(caches))(
            *(TokenCache(k.data_ptr(), v.data_ptr(), k.stride(1)) for k, v in caches)
        )
        step = TokenStep(
            cos.data_ptr(),
            sin.data_ptr(),
            addressof(rings) if caches else None,
            slot,
            seen,
            out.data_ptr(),
            logits.data_ptr(),
        )
        pointers = (c_void_p * len(layers))(*(addressof(layer.fields) for layer in layers))
        failed = self.functions.qmix_decode_token(pointers, len(layers), byref(step), *self._ways())
        if failed:
            raise ResourceError("no memory for a layer's activations", found=tuple(x.shape))
        return out, logits

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of single tokens to all of k and v: (B, H, 1, d) with (B, G, L, d) -> (B, H, 1, d).

        All bfloat16; the rows of k and v, G of them a batch, lie as far apart in both, positions behind
        one another.

        Raises:
            ResourceError: no memory for the scores.
        """
        assert self.functions is not None
        assert self.isa is not None
        batch, heads, _, width = q.shape
        q = q.contiguous()
        out = torch.empty_like(q)
        attended = Attended(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            batch * heads,
            batch * k.shape[1],
            width,
            k.shape[2],
            k.stride(1),
        )
        if self.functions.qmix_attend(byref(attended), *self._ways()):
            raise ResourceError("no memory for a token's attention", found=tuple(k.shape))
        return out

    def matmul_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K] times a weight [N, K], both bfloat16 and contiguous, T up to DENSE_TOKENS: [T, N].

        Summed in float32.
        """
        assert self.functions is not None
        assert self.isa is not None
        assert 0 < len(x) <= DENSE_TOKENS, x.shape
        inputs, out = x.float(), torch.empty(len(x), len(weight))
        product = DenseMatmul(
            weight.data_ptr(),
            inputs.data_ptr(),
            out.data_ptr(),
            len(weight),
            weight.shape[1],
            len(x),
        )
        self.functions.qmix_matmul_dense(byref(product), *self._ways())
        return out.to(x.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """pointwise.rms_norm over the last axis, all bfloat16 and contiguous."""
        assert self.functions is not None
        assert self.isa is not None
        out = torch.empty_like(x)
        width = weight.shape[0]
        self.functions.qmix_rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // width,
            width,
            eps,
            ISAS.index(self.isa),
        )
        return out

    def read(self, memory: Tensor) -> int:
        """Read a contiguous tensor of whole MiB once, on torch's threads; the xor of its words."""
        assert self.functions is not None
        return int(self.functions.qmix_read(memory.data_ptr(), memory.nbytes, *self._ways()))

    def _ways(self) -> tuple[int, int, int | None]:
        """The last arguments of every product: threads, instruction set, the entry to torch's threads."""
        assert self.isa is not None
        return torch.get_num_threads(), ISAS.index(self.isa), self._fork

    @property
    def _fork(self) -> int | None:
        """The entry to torch's threads; not in a forked child, where they do not live."""
        return self.fork if os.getpid() == self.process else None


@cache
def library() -> Library:
    """The library of this process; one warning if there is none.

    Raises:
        UsageError: `QMIX_CPU_KERNELS` names no instruction set, or one that this processor does not have.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted == "torch":
        return Library(None)
    if wanted is not None and wanted not in ISAS:
        raise UsageError(
            "no such CPU kernels",
            where=VARIABLE,
            expected=f"torch, {', '.join(ISAS)}",
            found=wanted,
        )
    try:
        functions = build.load()
    except QmixError as error:
        warnings.warn(
            f"4-bit products run on torch, at a tenth of the speed: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return Library(None)
    functions.qmix_matmul.argtypes = (POINTER(Matmul), c_int64, c_int32, c_int32, c_void_p)
    functions.qmix_matmul_packed.argtypes = (
        POINTER(Packed), c_void_p, c_void_p, c_int64, c_int32, c_int32, c_void_p,
    )  # fmt: skip
    functions.qmix_moe_token.argtypes = (
        POINTER(MixedExpert), c_int64, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p,
    )  # fmt: skip
    functions.qmix_before_attention.argtypes = (
        POINTER(TokenLayerFields), c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_void_p,
    )  # fmt: skip
    functions.qmix_after_attention.argtypes = (
        POINTER(TokenLayerFields), POINTER(TokenRoute), c_void_p, c_void_p, c_int32, c_int32, c_void_p,
    )  # fmt: skip
    functions.qmix_decode_token.argtypes = (
        c_void_p, c_int64, POINTER(TokenStep), c_int32, c_int32, c_void_p,
    )  # fmt: skip
    functions.qmix_attend.argtypes = (POINTER(Attended), c_int32, c_int32, c_void_p)
    functions.qmix_matmul_dense.argtypes = (POINTER(DenseMatmul), c_int32, c_int32, c_void_p)
    functions.qmix_matmul_dense.restype = None
    functions.qmix_rms_norm.argtypes = (
        c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int32,
    )  # fmt: skip
    functions.qmix_rms_norm.restype = None
    functions.qmix_read.argtypes = (c_void_p, c_int64, c_int32, c_int32, c_void_p)
    functions.qmix_read.restype = c_uint64
    best = int(functions.qmix_isa())
    isa = ISAS[best] if wanted is None else wanted
    if ISAS.index(isa) > best:
        raise UsageError(
            "this processor lacks such kernels",
            where=VARIABLE,
            expected=f"torch, {', '.join(ISAS[: best + 1])}",
            found=wanted,
        )
    return Library(isa, functions, _openmp())


def _openmp() -> int | None:
    """libgomp's entry in the very copy that torch runs on, for one set of threads and not two.

    None where torch has another, or where this process was forked off one whose threads it does not
    have: entering libgomp there would wait for them for ever.
    """
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as stat:
            flags = int(stat.read().rpartition(")")[2].split()[6])
        if flags & _FORKED:
            return None
        entry = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return ctypes.cast(entry, c_void_p).value


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled attention takes these, each query seeing all keys."""
    batch, groups, positions, width = k.shape
    return (
        q.is_cpu
        and q.shape[2] == 1
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and k.stride() == v.stride()
        and k.stride(3) == 1
        and (positions == 1 or k.stride(2) == width)
        and (batch == 1 or k.stride(0) == groups * k.stride(1))
        and library().isa is not None
    )
