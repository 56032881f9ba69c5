"""The packed layout: one run of bytes, in the order in which GPU kernels read a quantized matrix.

A matrix is cut into panels of 128 rows, and a panel into tiles of 32, 64 or 128 inputs. A byte of a
tile holds the codes of two rows: that of the low plane in its low nibble, that of the high plane in
its high nibble. In an expert's w1 and w3 they are the same row of both, so that one thread ends up
with a gate and its up projection; in any other matrix they are rows r and r + 64 of the panel.
Codes of eight bits have a byte each: those of the low plane, then those of the high one. Codes of
2, 3, 5 and 6 bits are cut into slices of bits (`bit_slices`), in tiles of 128 inputs. A matrix is

    header   128 bytes: float32 [2], the factors of the sums of the low and of the high plane;
             float32 [2], the powers of two by which the scales of the planes were divided;
             int32 [8], the words of a table that the kernels keep in registers: four of those that
             the instructions know, eight of others
    panels   [N / 128][K / C] tiles, each
             codes   [C / 32][4 warps][32 lanes][16 bytes], twice where they have eight bits; of
                     slices [bits][4 warps][32 lanes][16 bytes]
             scales  [groups][64] pairs of float16: low plane, high plane
             zeros   the same, only if asymmetric: half of the codes' range (2 to 128) minus the
                     zero, or plus the bias over the scale

A tile is one group, or groups of 16 inputs, or of 16, 32 or 64 where codes are sliced. An expert is
the matrix of w1 and w3, then the matrix of w2. Every section is a multiple of 128 bytes. The 16
bytes of a lane are its codes of 16 rows and 32 inputs (or slices of those of 128 inputs), in the
order of its registers as the first operand of mma.m16n8k16: one 128-bit load, and no exchange
between threads.

A scale is stored as float16 times a power of two that all scales of the plane share. That is exact
for scales that are float16 or bfloat16 already, as those of Int4 are; the absmax of NF4 is rounded,
by at most 2^-11 = 0.049 %. Measured on normal weights, this changes a matmul by 0.019 %, the table
in float16 by 0.012 %, both together by 0.022 %. The usual rounding of weights to bfloat16 changes
it by 0.16 %, and NF4 itself by 9 %. A weight takes 4.25 bits instead of the 4.127 of nested absmax:
3 % more bytes, but to decode nested scales in the loop would cost about 0.6 instructions a weight
(estimated) of the 4.5 that an H100 has time for. Eight bits a scale, in one linear step for every
256, would change a matmul by 0.18 %. In groups of 16 the scaled weights are rounded to float16 too;
the shared power of two is chosen so that they do not overflow.

Act-order: columns are packed as they are stored, sorted by group, and the activations are permuted
to match. The w2 of an expert needs no permutation: the rows of w1 and w3 are packed in its order.

Knows torch, and no kernel. Shape letters: see qmix.kernels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert
from qmix.weights.packed.codes import HALF_RANGE, TABLES, StoredTable
from qmix.weights.packed.lanes import from_lanes, to_lanes
from qmix.weights.packed.packed_shapes import (
    ExpertFormat,
    expert_format,
    joined,
    matrix_format,
    padded,
)
from qmix.weights.packed.planes import (
    Plane,
    equal_or_none,
    has_free_zeros,
    own_values,
    perm_of,
    plane_of,
    spec_of,
    table_of,
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
_WORDS = slice(4, 12)  # of a table, among the words of a header


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """One packed matrix: `blob` is uint8 [matrix_bytes], aligned to 128 bytes on a GPU.

    Attributes:
        shape: (N, K).
        group: consecutive weights that shared a scale in the weight that was packed.
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

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each packed code, before scales and zeros."""
        kind = self.format.table
        if kind is None:
            half = HALF_RANGE[self.format.kind]
            return tuple(float(code - half) for code in range(2 * half))
        if not self.format.own_table:
            return tuple(VALUES[kind][code] for code in TABLES[kind].code_of_stored)
        high, low = self.blob[16:48].cpu().view(2, 16)
        stretched = torch.stack((low, high), 1).view(torch.float16).flatten().float()
        factor, _, power, _ = self.blob[:16].cpu().view(torch.float32).tolist()
        return tuple((stretched * (factor / power)).tolist())


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


def pack_matrix(*weights: Weight) -> PackedMatrix:
    """Pack a matrix [N, K] on its own device, or the rows of several as one.

    One by itself gets rows of zeros that fill its last panel.

    Raises:
        UnsupportedError: there is no tile format for its kind, shape or groups (see
            `tile_format`), or for several weights no common one.
    """
    first = weights[0]
    specs = [spec_of(weight) for weight in weights]
    spec = joined(specs) if len(specs) > 1 else padded(specs[0])
    tile_format = matrix_format(spec)
    for weight in weights[1:]:
        if not equal_or_none(perm_of(weight), perm_of(first)):
            raise UnsupportedError("matrices that are joined must have their inputs in one order")
        if not equal_or_none(own_values(weight), own_values(first)):
            raise UnsupportedError("matrices that are joined must have one table")
    whole = Plane.joined([plane_of(weight, tile_format) for weight in weights])
    whole = whole.padded(spec.shape[0])
    panel_rows = torch.arange(spec.shape[0], device=first.device).view(-1, 2, BYTE_ROWS)
    low, high = (whole.select(panel_rows[:, half].flatten()) for half in (0, 1))
    blob = _pack(low, high, tile_format, table_of(first, tile_format))
    return PackedMatrix(
        blob, tile_format, spec.shape, spec.group, first.dtype, perm_of(first),
        any(map(has_free_zeros, weights)),
    )  # fmt: skip


def unpack_matrix(packed: PackedMatrix) -> Weight:
    """The inverse of `pack_matrix`; the scales stay as packing rounded them."""
    rows = torch.arange(packed.shape[0], device=packed.blob.device).view(2, -1, BYTE_ROWS)
    whole = Plane.joined(_unpack(packed))
    return _weight_of(packed, whole.select(rows.transpose(0, 1).flatten()))


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
    gate_up = _pack(gate, up, layout.gate_up, table_of(expert.w1, layout.gate_up))
    blob = torch.cat((gate_up, down.blob))
    return PackedExpert(
        blob,
        PackedMatrix(
            blob[: len(gate_up)],
            layout.gate_up,
            layout.shape,
            spec_of(expert.w1).group,
            expert.w1.dtype,
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
    for what, of in (("inputs in the order", perm_of), ("the table", own_values)):
        if not equal_or_none(of(expert.w1), of(expert.w3)):
            raise refusal(
                "w1 and w3 of an expert are packed together and must be stored alike",
                "w3",
                f"{what} of w1",
                "another",
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
    step, kind = packed.group // packed.format.group_inputs, packed.format.table
    if kind is not None:
        codes, values = rows.codes, VALUES[kind]
        if packed.format.own_table:
            values = packed.values
        else:
            codes = translated(codes, TABLES[kind].code_of_stored)
        return Table(
            codes=(codes[:, 0::2] << 4 | codes[:, 1::2]).flatten(),
            scales=rows.scales.flatten()[::step],
            table=torch.tensor(values, device=codes.device),
            out_shape=(codes.shape[0], codes.shape[1]),
            out_dtype=packed.dtype,
            block_size=packed.group,
            kind=kind,
        )
    scales, zeros = rows.scales[:, ::step], None
    if rows.zeros is not None:
        zeros = HALF_RANGE[packed.format.kind] - rows.zeros[:, ::step]
        if not packed.free_zeros:
            zeros = zeros.to(torch.uint8)
    rounded = scales.to(packed.dtype)
    if torch.equal(rounded.float(), scales):  # not those that were nested
        scales = rounded
    bits = packed.format.bits
    return Affine(
        pack_codes(rows.codes, bits), scales, zeros, packed.perm, bits, out_dtype=packed.dtype
    )


def _pack(low: Plane, high: Plane, tile_format: TileFormat, table: StoredTable | None) -> Tensor:
    """Two planes as a blob."""
    rows, in_features = low.codes.shape
    inputs, group = tile_format.inputs, tile_format.group_inputs
    panels, tiles = rows // BYTE_ROWS, in_features // inputs

    def pairs(first: Tensor, second: Tensor) -> Tensor:
        both = torch.stack((first.half(), second.half()), -1)
        both = both.view(panels, BYTE_ROWS, tiles, inputs // group, 2).permute(0, 2, 3, 1, 4)
        return both.reshape(panels, tiles, -1).view(torch.uint8)

    sections = to_lanes(low.codes, high.codes, tile_format)
    exponents = torch.stack([_exponent(plane, tile_format, table) for plane in (low, high)])
    scales = (torch.ldexp(low.scales, -exponents[0]), torch.ldexp(high.scales, -exponents[1]))
    sections.append(pairs(*scales))
    if low.zeros is not None and high.zeros is not None:
        sections.append(pairs(low.zeros, high.zeros))
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    header = torch.zeros(HEADER_BYTES // 4, device=low.codes.device)
    header[:2] = powers if table is None else powers / table.stretch
    header[2:4] = powers
    if table is not None:
        words = torch.tensor(table.words).to(torch.int32)
        header[_WORDS].view(torch.int32)[: len(words)] = words
    return torch.cat((header.view(torch.uint8), torch.cat(sections, 2).flatten()))


def _exponent(plane: Plane, tile_format: TileFormat, table: StoredTable | None) -> Tensor:
    """The power of two that brings the largest scale into [2^14, 2^15).

    Or, where weights are multiplied by their scale in float16, the largest that a group's can be.
    """
    largest = plane.scales.abs()
    if tile_format.scales_weights:
        reach = HALF_RANGE[tile_format.kind] if table is None else max(map(abs, table.values))
        largest = largest * (reach if plane.zeros is None else reach + plane.zeros.abs())
    exponent = torch.frexp(largest.max()).exponent - _LARGEST_EXPONENT
    return exponent.clamp(-100, 100)  # the header's powers stay normal numbers


def _unpack(packed: PackedMatrix) -> tuple[Plane, Plane]:
    """The inverse of `_pack`."""
    tile_format = packed.format
    rows, in_features = packed.shape[0] // 2, packed.shape[1]
    inputs, group = tile_format.inputs, tile_format.group_inputs
    panels, tiles = rows // BYTE_ROWS, in_features // inputs
    powers = packed.blob[8:16].view(torch.float32)
    tile = packed.blob[HEADER_BYTES:].view(panels, tiles, tile_format.tile_bytes)

    def pairs(section: Tensor) -> Tensor:
        both = section.contiguous().view(torch.float16)
        both = both.view(panels, tiles, inputs // group, BYTE_ROWS, 2).permute(0, 3, 1, 2, 4)
        return both.reshape(rows, in_features // group, 2).float()

    planes = from_lanes(tile[:, :, : tile_format.code_bytes], tile_format)
    scale_end = tile_format.code_bytes + tile_format.scale_bytes
    scales = pairs(tile[:, :, tile_format.code_bytes : scale_end]) * powers
    zeros = None if tile_format.symmetric else pairs(tile[:, :, scale_end:])
    low, high = (
        Plane(part, scales[..., i], None if zeros is None else zeros[..., i])
        for i, part in enumerate(planes)
    )
    return low, high
