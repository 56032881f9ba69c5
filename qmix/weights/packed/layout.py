"""The packed layout: one run of bytes, in the order in which GPU kernels read a 4-bit matrix.

A matrix is cut into panels of 128 rows, and a panel into tiles of 32, 64 or 128 inputs. A byte of a
tile holds the codes of two rows: that of the low plane in its low nibble, that of the high plane in
its high nibble. In an expert's w1 and w3 they are the same row of both, so that one thread ends up
with a gate and its up projection; in any other matrix they are rows r and r + 64 of the panel. A
matrix is

    header   128 bytes: float32 [2], the factors of the sums of the low and of the high plane;
             float32 [2], the powers of two by which the scales of the planes were divided;
             int32 [4], the words of a table that the kernels keep in registers; NF4's of integers
    panels   [N / 128][K / C] tiles, each
             codes   [C / 32][4 warps][32 lanes][16 bytes]
             scales  [64] pairs of float16: low plane, high plane
             zeros   [64] pairs of float16, only if asymmetric: 8 minus the zero, or plus the bias
                     over the scale

An expert is the matrix of w1 and w3, then the matrix of w2. Every section is a multiple of 128
bytes. The 16 bytes of a lane are its codes of 16 rows and 32 inputs, in the order of its registers
as the first operand of mma.m16n8k16: one 128-bit load, and no exchange between threads.

A scale is stored as float16 times a power of two that all scales of the plane share. That is exact
for scales that are float16 or bfloat16 already, as those of Int4 are; the absmax of NF4 is rounded,
by at most 2^-11 = 0.049 %. Measured on normal weights, this changes a matmul by 0.019 %, the table
in float16 by 0.012 %, both together by 0.022 %. The usual rounding of weights to bfloat16 changes
it by 0.16 %, and NF4 itself by 9 %. A weight takes 4.25 bits instead of the 4.127 of nested absmax:
3 % more bytes, but to decode nested scales in the loop would cost about 0.6 instructions a weight
(estimated) of the 4.5 that an H100 has time for. Eight bits a scale, in one linear step for every
256, would change a matmul by 0.18 %.

Act-order: columns are packed as they are stored, sorted by group, and the activations are permuted
to match. The w2 of an expert needs no permutation: the rows of w1 and w3 are packed in its order.

Knows torch, and no kernel. Shape letters: see qmix.kernels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmix.weights.affine import Affine, pack_codes
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert
from qmix.weights.packed.codes import INT4_ZERO, TABLES
from qmix.weights.packed.packed_shapes import ExpertFormat, expert_format, matrix_format
from qmix.weights.packed.planes import (
    Plane,
    check_table,
    group_of,
    has_free_zeros,
    perm_of,
    plane_of,
    same_order,
    spec_of,
    translated,
)
from qmix.weights.packed.tile_format import (
    BYTE_ROWS,
    HEADER_BYTES,
    TileFormat,
    refusal,
)
from qmix.weights.table import VALUES, Table

_LARGEST_EXPONENT = 15  # scales of a plane are brought below 2^15; float16 ends at 2^16


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """One packed matrix: `blob` is uint8 [matrix_bytes], aligned to 128 bytes on a GPU.

    Attributes:
        shape: (N, K).
        group: inputs that shared a scale in the weight that was packed, a multiple of C.
        dtype: what the weight dequantizes to by default.
        perm: int32 [K], the layer's input that each packed input is; None is the identity.
        free_zeros: its zeros are no codes.
    """

    blob: Tensor
    format: TileFormat
    shape: tuple[int, int]
    group: int
    dtype: torch.dtype
    perm: Tensor | None = None
    free_zeros: bool = False


@dataclass(frozen=True, eq=False)
class PackedExpert:
    """A SwiGLU expert as one blob; `gate_up` [2F, D] and `down` [D, F] are views into it.

    `inner_perm` int32 [F]: the row of w1 and w3, and the column of w2, that each packed one is;
    None is the identity.
    """

    blob: Tensor
    gate_up: PackedMatrix
    down: PackedMatrix
    inner_perm: Tensor | None = None

    @property
    def format(self) -> ExpertFormat:
        return ExpertFormat(self.gate_up.format, self.down.format, self.gate_up.shape)


def pack_matrix(weight: Weight) -> PackedMatrix:
    """Pack an NF4 or Int4 matrix [N, K] on its own device.

    Raises:
        UnsupportedError: the weight is of another kind, N is no multiple of 128, K or the scales'
            group is no multiple of 64, blocks straddle rows, or the table is not NF4's.
    """
    tile_format = matrix_format(spec_of(weight))
    check_table(weight, "the weight")
    whole = plane_of(weight, tile_format)
    panel_rows = torch.arange(weight.shape[0], device=weight.device).view(-1, 2, BYTE_ROWS)
    low, high = (whole.select(panel_rows[:, half].flatten()) for half in (0, 1))
    blob = _pack(low, high, tile_format)
    return PackedMatrix(
        blob, tile_format, weight.shape, group_of(weight), weight.dtype, perm_of(weight),
        has_free_zeros(weight),
    )  # fmt: skip


def unpack_matrix(packed: PackedMatrix) -> Weight:
    """The inverse of `pack_matrix`; the scales stay as packing rounded them."""
    low, high = _unpack(packed)
    rows = torch.arange(packed.shape[0], device=packed.blob.device).view(2, -1, BYTE_ROWS)
    return _weight_of(packed, low.join(high).select(rows.transpose(0, 1).flatten()))


def pack_expert(expert: Expert) -> PackedExpert:
    """Pack an expert as one blob.

    Raises:
        UnsupportedError: as pack_matrix, for any of the three (of w1 and w3, N must be a multiple
            of 64), or w1 and w3 are stored differently.
    """
    layout = format_of(expert)
    perm, inner_perm = perm_of(expert.w1), perm_of(expert.w2)
    down = pack_matrix(expert.w2)
    gate, up = plane_of(expert.w1, layout.gate_up), plane_of(expert.w3, layout.gate_up)
    if inner_perm is not None:
        gate, up = gate.select(inner_perm), up.select(inner_perm)
    gate_up = _pack(gate, up, layout.gate_up)
    blob = torch.cat((gate_up, down.blob))
    group, dtype = group_of(expert.w1), expert.w1.dtype
    return PackedExpert(
        blob,
        PackedMatrix(
            blob[: len(gate_up)],
            layout.gate_up,
            layout.shape,
            group,
            dtype,
            perm,
            has_free_zeros(expert.w1) or has_free_zeros(expert.w3),
        ),
        replace(down, blob=blob[len(gate_up) :], perm=None),
        inner_perm,
    )


def format_of(expert: Expert) -> ExpertFormat:
    """How an expert is packed.

    Raises:
        UnsupportedError: as pack_expert.
    """
    layout = expert_format(*(spec_of(weight) for weight in (expert.w1, expert.w2, expert.w3)))
    for name in ("w1", "w2", "w3"):
        check_table(getattr(expert, name), name)
    if not same_order(perm_of(expert.w1), perm_of(expert.w3)):
        raise refusal(
            "w1 and w3 of an expert are packed together and must be stored alike",
            "w3",
            "inputs in the order of w1",
            "inputs in another order",
        )
    return layout


def unpack_expert(packed: PackedExpert) -> Expert:
    """The inverse of `pack_expert`, exact as `unpack_matrix` is."""
    gate, up = _unpack(packed.gate_up)
    if packed.inner_perm is not None:
        rows = torch.argsort(packed.inner_perm)
        gate, up = gate.select(rows), up.select(rows)
    w2 = unpack_matrix(replace(packed.down, perm=packed.inner_perm))
    return Expert(w1=_weight_of(packed.gate_up, gate), w2=w2, w3=_weight_of(packed.gate_up, up))


def with_blob(packed: PackedExpert, blob: Tensor) -> PackedExpert:
    """The expert with its bytes in `blob`, a copy of its own; permutations move to that device."""
    end, perm, inner_perm = len(packed.gate_up.blob), packed.gate_up.perm, packed.inner_perm
    perm = None if perm is None else perm.to(blob.device)
    return PackedExpert(
        blob,
        replace(packed.gate_up, blob=blob[:end], perm=perm),
        replace(packed.down, blob=blob[end:]),
        None if inner_perm is None else inner_perm.to(blob.device),
    )


def _weight_of(packed: PackedMatrix, rows: Plane) -> Weight:
    step = packed.group // packed.format.inputs
    codes, scales = rows.codes, rows.scales[:, ::step]
    kind = packed.format.kind
    if kind != "int4":
        codes = translated(codes, TABLES[kind].code_of_stored)
        return Table(
            codes=(codes[:, 0::2] << 4 | codes[:, 1::2]).flatten(),
            scales=scales.flatten(),
            table=torch.tensor(VALUES[kind], device=codes.device),
            out_shape=(codes.shape[0], codes.shape[1]),
            out_dtype=packed.dtype,
            block_size=packed.group,
            kind=kind,
        )
    zeros = None
    if rows.zeros is not None:
        zeros = INT4_ZERO - rows.zeros[:, ::step]
        if not packed.free_zeros:
            zeros = zeros.to(torch.uint8)
    rounded = scales.to(packed.dtype)
    if torch.equal(rounded.float(), scales):  # not those that were nested
        scales = rounded
    return Affine(pack_codes(codes), scales, zeros, packed.perm, out_dtype=packed.dtype)


# Dimensions of a matrix of bytes: panel, warp, r, g; tile, 32 inputs, j, c, t, p. Lane 4g + t holds
# rows 8r + g and inputs 16j + 8c + 2t + p, in the order c, r, j, p.
_TO_LANES = (0, 4, 5, 1, 3, 8, 7, 2, 6, 9)
_FROM_LANES = tuple(_TO_LANES.index(dim) for dim in range(len(_TO_LANES)))


def _pack(low: Plane, high: Plane, tile_format: TileFormat) -> Tensor:
    """Two planes as a blob."""
    rows, in_features = low.codes.shape
    panels, tiles, halves = (
        rows // BYTE_ROWS,
        in_features // tile_format.inputs,
        tile_format.inputs // 32,
    )

    def pairs(first: Tensor, second: Tensor) -> Tensor:
        both = torch.stack((first.half(), second.half()), -1).view(panels, BYTE_ROWS, tiles, 2)
        return both.transpose(1, 2).reshape(panels, tiles, -1).view(torch.uint8)

    codes = low.codes | high.codes << 4
    codes = codes.view(panels, 4, 2, 8, tiles, halves, 2, 2, 4, 2).permute(_TO_LANES)
    exponents = torch.stack((_exponent(low.scales), _exponent(high.scales)))
    scales = (torch.ldexp(low.scales, -exponents[0]), torch.ldexp(high.scales, -exponents[1]))
    sections = [codes.reshape(panels, tiles, -1), pairs(*scales)]
    if low.zeros is not None and high.zeros is not None:
        sections.append(pairs(low.zeros, high.zeros))
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    header = torch.zeros(HEADER_BYTES // 4, device=codes.device)
    table = TABLES["nf4" if tile_format.kind == "int4" else tile_format.kind]
    header[:2] = powers / (1 if tile_format.kind == "int4" else table.stretch)
    header[2:4] = powers
    header[4:8].view(torch.int32)[:] = torch.tensor(table.words).to(torch.int32)
    return torch.cat((header.view(torch.uint8), torch.cat(sections, 2).flatten()))


def _exponent(scales: Tensor) -> Tensor:
    """The power of two that brings the largest scale into [2^14, 2^15)."""
    exponent = torch.frexp(scales.abs().max()).exponent - _LARGEST_EXPONENT
    return exponent.clamp(-100, 100)  # the header's powers stay normal numbers


def _unpack(packed: PackedMatrix) -> tuple[Plane, Plane]:
    """The inverse of `_pack`."""
    tile_format = packed.format
    rows, in_features = packed.shape[0] // 2, packed.shape[1]
    panels, tiles, halves = (
        rows // BYTE_ROWS,
        in_features // tile_format.inputs,
        tile_format.inputs // 32,
    )
    powers = packed.blob[8:16].view(torch.float32)
    tile = packed.blob[HEADER_BYTES:].view(panels, tiles, tile_format.tile_bytes)
    codes = tile[:, :, : tile_format.code_bytes].reshape(panels, tiles, halves, 4, 8, 4, 2, 2, 2, 2)
    codes = codes.permute(_FROM_LANES).reshape(rows, in_features)

    def pairs(section: Tensor) -> Tensor:
        both = section.contiguous().view(torch.float16).view(panels, tiles, BYTE_ROWS, 2)
        return both.transpose(1, 2).reshape(rows, tiles, 2).float()

    scale_end = tile_format.code_bytes + BYTE_ROWS * 4
    scales = pairs(tile[:, :, tile_format.code_bytes : scale_end]) * powers
    zeros = None if tile_format.symmetric else pairs(tile[:, :, scale_end:])
    low, high = (
        Plane(part, scales[..., i], None if zeros is None else zeros[..., i])
        for i, part in enumerate((codes & 15, codes >> 4))
    )
    return low, high
