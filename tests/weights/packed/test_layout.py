"""The packed layout and the instructions that decode it: inverses, values, refusals."""

import re
import struct
from dataclasses import replace

import pytest
import torch

from qmix.errors import UnsupportedError
from qmix.kernels.gpu import ptx
from qmix.weights.affine import Affine
from qmix.weights.dense import Dense
from qmix.weights.expert import Expert
from qmix.weights.packed.codes import TABLES, own_table
from qmix.weights.packed.layout import pack_expert, pack_matrix, unpack_expert, unpack_matrix
from qmix.weights.packed.table import ExpertTable
from qmix.weights.packed.tile_format import PANEL, TileFormat
from qmix.weights.packed.weight import pack, pack_joined
from qmix.weights.scales import floats
from qmix.weights.table import VALUES
from tests.support.packed import KINDS, OTHERS, act_order, as_computed, int4, int8, nf4

SHAPES = [(128, 64), (128, 128), (384, 192), (256, 448), (128, 1024)]


def assert_same(back, weight):
    assert back.shape == weight.shape
    assert back.scheme.kind == weight.scheme.kind
    assert torch.equal(back.codes, weight.codes)
    if isinstance(weight, Affine):
        assert torch.equal(back.scales, weight.scales)
        assert back.scales.dtype == weight.scales.dtype
        assert (back.zeros is None) == (weight.zeros is None)
        assert weight.zeros is None or torch.equal(back.zeros, weight.zeros)
        assert (back.perm is None) == (weight.perm is None)
        assert weight.perm is None or torch.equal(back.perm, weight.perm)
    else:
        blocks = weight.codes.numel() * 2 // weight.block_size
        scales = floats(weight.scales, 0, blocks)
        assert back.block_size == weight.block_size
        assert ((back.scales - scales).abs() <= 2**-11 * scales).all()
        mantissa = torch.frexp(back.scales).mantissa * 2**11
        assert torch.equal(mantissa, mantissa.round())  # rounded to float16, once


def pack_and_back(weight):
    return unpack_matrix(pack_matrix(weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_is_the_inverse_of_pack(kind, shape):
    weight = KINDS[kind](*shape)
    packed = pack_matrix(weight)
    assert packed.blob.dtype == torch.uint8
    assert packed.blob.is_contiguous()
    assert len(packed.blob) == packed.format.matrix_bytes(shape)
    assert len(packed.blob) % 128 == packed.format.tile_bytes % 128 == 0
    assert_same(unpack_matrix(packed), weight)
    assert torch.equal(pack_matrix(unpack_matrix(packed)).blob, packed.blob)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(128, 64), (256, 192)], ids=str)
def test_an_expert_is_one_blob(kind, sizes):
    hidden, width = sizes
    make = KINDS[kind]
    expert = Expert(make(width, hidden, 1), make(hidden, width, 2), make(width, hidden, 3))
    packed = pack_expert(expert)
    assert len(packed.blob) == len(packed.gate_up.blob) + len(packed.down.blob)
    assert packed.gate_up.shape == (2 * width, hidden)
    assert packed.down.blob.data_ptr() - packed.blob.data_ptr() == len(packed.gate_up.blob)
    back = unpack_expert(packed)
    for name in ("w1", "w2", "w3"):
        assert_same(getattr(back, name), getattr(expert, name))


def test_a_large_block_is_stored_a_tile_at_a_time():
    weight = nf4(128, 512, block=256)
    packed = pack_matrix(weight)
    assert packed.format == TileFormat("nf4", 128)
    assert packed.group == 256
    assert_same(unpack_matrix(packed), weight)


def test_bits_a_weight():
    """What the kernels read a weight; the header is 128 bytes a matrix."""
    for plan, bits in (
        (TileFormat("nf4", 64), 4.25),
        (TileFormat("int4", 128), 4.125),
        (TileFormat("int4", 64), 4.25),
        (TileFormat("int4", 128, symmetric=False), 4.25),
    ):
        assert 8 * plan.tile_bytes / (PANEL * plan.inputs) == bits
        assert 8 * plan.matrix_bytes((28672, 4096)) / (28672 * 4096) < bits + 1e-4


def test_extreme_scales_keep_their_ratio():
    """A power of two for the whole matrix brings scales into the range of float16."""
    for factor in (1e-12, 1e-6, 1.0, 1e6, 1e30):
        weight = nf4(128, 64)
        weight = replace(weight, scales=weight.scales * factor)
        back = pack_and_back(weight)
        assert ((back.scales - weight.scales).abs() <= 2**-11 * weight.scales).all()
    nothing = replace(weight, scales=torch.zeros_like(weight.scales))
    assert not pack_and_back(nothing).scales.any()


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (Dense(torch.zeros(128, 64)), "dense"),
        (int4(128, 80, group=80), "80 inputs in groups of 80"),
        (int4(128, 96, group=24), "groups of 24"),
    ],
)
def test_what_has_no_packed_order_is_refused_by_name(weight, named):
    with pytest.raises(UnsupportedError, match=named):
        pack_matrix(weight)


def test_w1_and_w3_must_be_stored_alike():
    with pytest.raises(UnsupportedError, match="stored alike"):
        pack_expert(Expert(nf4(64, 128), nf4(128, 64), int4(64, 128)))
    with pytest.raises(UnsupportedError, match="stored alike"):
        pack_expert(Expert(int4(64, 128), int4(128, 64), int4(64, 128, group=128)))
    other = replace(act_order(64, 128), perm=torch.arange(128).int())
    with pytest.raises(UnsupportedError, match="inputs in the order of w1"):
        pack_expert(Expert(act_order(64, 128), int4(128, 64), other))


def test_the_table_holds_addresses():
    experts = [
        pack_expert(Expert(nf4(64, 128, i), nf4(128, 64, i + 1), nf4(64, 128, i + 2)))
        for i in range(4)
    ]
    table = ExpertTable.build([experts[:2], experts[2:]])
    assert table.addresses.dtype == torch.int64
    assert table.addresses.tolist() == [
        [e.blob.data_ptr() for e in experts[:2]],
        [e.blob.data_ptr() for e in experts[2:]],
    ]
    assert table.down_offset(0) == len(experts[0].gate_up.blob)
    ((gate_up,), (down,)) = table.gate_up, table.down
    assert gate_up.members is None
    assert down.addresses is table.addresses  # a store changes them in place
    assert (gate_up.offset, down.offset) == (0, table.down_offset(0))
    with pytest.raises(UnsupportedError, match="powers of two"):
        ExpertTable.build([experts[:3]])


def test_a_table_of_several_forms_says_which_experts_have_which():
    one, other = (
        pack_expert(Expert(make(64, 128), int4(128, 64), make(64, 128))) for make in (nf4, int8)
    )
    table = ExpertTable.build([[one, other, one, one]])
    assert [form.members.tolist() for form in table.gate_up] == [[0, 4, 2, 3], [4, 1, 4, 4]]
    (down,) = table.down
    assert (down.members, down.offset) == (None, 0)
    assert [down.at(0).tolist()] == [[each.down.blob.data_ptr() for each in (one, other, one, one)]]
    table.addresses.add_(4096)  # as a store changes it
    assert down.at(0).tolist() == [
        each.down.blob.data_ptr() + 4096 for each in (one, other, one, one)
    ]
    with pytest.raises(UnsupportedError, match="one shape"):
        ExpertTable.build([[one] * 2, [other] * 2])


# The instruction strings themselves, executed on int64 tensors of 32-bit words.

MASK = 0xFFFFFFFF


def prmt(a, b, selector):
    data = a | b << 32
    out = torch.tensor(0)
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = data >> 8 * (pick & 7) & 0xFF
        out = out | torch.where(pick > 7, (byte >> 7) * 0xFF, byte) << 8 * i
    return out


def add_halves(a, b):
    def halves(word):
        return torch.stack((word & 0xFFFF, word >> 16), -1).to(torch.uint16).view(torch.float16)

    both = (halves(a) + halves(b)).view(torch.uint16).long()
    return both[..., 0] | both[..., 1] << 16


def lop3(a, b, c, table):
    out = torch.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            x, y, z = (v if i >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0)))
            out |= x & y & z
    return out & MASK


def execute(text, word, words):
    """Run one instruction string on the words `$4`; the four output registers.

    Args:
        words: what is kept in registers, each four times.
    """
    registers = {"$4": word}
    for group, value in enumerate(words):
        registers.update({f"${5 + 4 * group + i}": torch.tensor(value) for i in range(4)})

    def value(operand):
        return registers[operand] if operand in registers else torch.tensor(int(operand, 0))

    body = text.strip().removeprefix("{").removesuffix("}")
    written = set()
    for line in filter(None, (part.strip() for part in body.split(";"))):
        if line.startswith(".reg"):
            continue
        name, operands = re.fullmatch(r"(\S+)\s+(.*)", line).groups()
        target, *sources = (part.strip() for part in operands.split(","))
        arguments = [value(source) for source in sources]
        if target.startswith("$"):
            assert int(target[1:]) < 4  # inputs are never overwritten
            written.add(target)
        registers[target] = {
            "mov.b32": lambda a: a,
            "shr.b32": lambda a, n: a >> n,
            "xor.b32": lambda a, b: a ^ b,
            "and.b32": lambda a, b: a & b,
            "prmt.b32": lambda a, b, c: prmt(a, b, c & 0xFFFF),
            "lop3.b32": lop3,
            "add.f16x2": add_halves,
        }[name](*arguments)
    assert written == {"$0", "$1", "$2", "$3"}
    return [registers[f"${i}"] for i in range(4)]


def meant(word, bits):
    """Low codes of bytes 0 to 3 in two registers, then the high ones."""
    value = [torch.tensor(bits)[word >> 4 * i & 15] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return [value[i] | value[i + 1] << 16 for i in range(0, 8, 2)]


INT4_BITS = tuple(struct.unpack("<H", struct.pack("<e", float(c - 8)))[0] for c in range(16))
ANY = own_table([0.7 * (-1) ** (i * i % 3) / (i + 1) for i in range(16)])


@pytest.mark.parametrize(
    ("text", "bits", "kept"),
    [
        (ptx.INT4_INSTRUCTIONS, INT4_BITS, ptx.INT4_WORDS),
        *((ptx.TABLE_INSTRUCTIONS[kind], t.bits, t.words) for kind, t in TABLES.items()),
        (ptx.ANY_TABLE_INSTRUCTIONS, ANY.bits, ANY.words),
    ],
    ids=["int4", *TABLES, "any"],
)
def test_the_instructions_give_the_table_exactly(text, bits, kept):
    pairs = torch.arange(65536)  # all byte pairs in each half of a word
    drawn = torch.randint(0, 2**32, (2**20,), generator=torch.Generator().manual_seed(0))
    for words in (pairs | (pairs ^ 0xFFFF) << 16, drawn):
        for found, expected in zip(execute(text, words, kept), meant(words, bits), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_its_values_in_float16(kind):
    """Renumbered and stretched, within half a unit of float16; zero stays zero."""
    table = TABLES[kind]
    assert sorted(table.code_of_stored) == list(range(16))
    for code, value in enumerate(VALUES[kind]):
        stored = table.values[table.stored_of_code[code]]
        bound = 1.83e-4 if kind == "nf4" else 1e-7  # the others are exact
        assert abs(stored / table.stretch - value) <= bound * abs(value)
        assert stored == struct.unpack("<e", struct.pack("<e", table.stretch * value))[0]


def test_instructions_a_weight():
    texts = (*ptx.TABLE_INSTRUCTIONS.values(), ptx.ANY_TABLE_INSTRUCTIONS, ptx.INT4_INSTRUCTIONS)
    count = {
        text: sum(line.strip()[0] not in "{}." and not line.startswith("mov") for line in text.splitlines())
        for text in texts
    }  # fmt: skip
    looked_up = dict.fromkeys(ptx.TABLE_INSTRUCTIONS.values(), 19)
    meant = {**looked_up, ptx.ANY_TABLE_INSTRUCTIONS: 21, ptx.INT4_INSTRUCTIONS: 10}
    assert count == meant  # for 8 weights


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_brought_into_the_forms_of_the_kernels(kind):
    """And come back as they were stored, bit for bit; the kernels err by their rounding only."""
    weight = OTHERS[kind](128, 128)
    packed = pack(weight)
    assert packed.matrix.blob.nbytes == packed.matrix.format.matrix_bytes((128, 128))
    back = packed.unpack()
    assert (type(back), back.scheme) == (type(weight), weight.scheme)
    assert torch.equal(back.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert torch.equal(back.codes, weight.codes)
    meant, found = weight.dequantize(torch.float32), as_computed(packed.matrix)
    assert (found - meant).norm() <= 2**-11 * meant.norm()


@pytest.mark.parametrize("kind", ["int4 biases", "int2 biases g16", "int8 biases g16"])
def test_a_group_that_is_almost_constant_keeps_its_bias(kind):
    """A bias of more scales than float16 holds; a scale of 0, with a bias and without."""
    weight = OTHERS[kind](128, 64)
    weight.scales[3, 1] = 0
    weight.scales[5, 0], weight.biases[5, 0] = 2**-22, 0.5
    weight.scales[7, 0], weight.biases[7, 0] = 0, 0
    packed = pack(weight)
    meant, found = weight.dequantize(torch.float32), as_computed(packed.matrix)
    assert torch.equal(packed.unpack().dequantize(torch.float32), meant)
    assert (found - meant).norm() <= 2**-11 * meant.norm()
    size = weight.group_inputs
    bound = 2**-7 if weight.bits == 8 else 2**-10
    for row, group in ((3, 1), (5, 0), (7, 0)):
        inputs = slice(group * size, (group + 1) * size)
        assert ((found - meant)[row, inputs].abs() <= bound * meant[row, inputs].abs()).all()


@pytest.mark.parametrize("how", ["nf4", "int4"])
def test_groups_that_are_no_multiple_of_32(how):
    weight = int4(128, 96, group=48) if how == "int4" else nf4(128, 96, block=32)
    assert_same(pack_and_back(weight), weight)


@pytest.mark.parametrize("kind", ["nf4 b32", "int4 biases", "int8 asymmetric", "e2m1 b16"])
@pytest.mark.parametrize("rows", [8, 200])
def test_the_last_panel_may_be_part_full(kind, rows):
    """As that of a head with added tokens."""
    weight = OTHERS[kind](rows, 64)
    packed = pack(weight)
    assert packed.shape == (rows, 64)
    assert packed.matrix.shape == (-(-rows // PANEL) * PANEL, 64)
    meant = weight.dequantize(torch.float32)
    assert torch.equal(packed.dequantize(torch.float32), meant)
    computed = as_computed(packed.matrix)
    assert (computed[:rows] - meant).norm() <= 2**-11 * meant.norm()


MIXED = {
    "Q4_K_M": [("int4 biases", 256), ("int8", 128), ("int8", 128)],
    "IQ4_XS": [("iq4", 256), ("int8", 128), ("int6 nested g16", 128)],
    "Q2_K": [("int2 biases g16", 128), ("int4 zeros", 128), ("int3 nested g16", 256)],
    "IQ3_XXS": [("iq3_s", 256), ("iq3_xxs b16", 128), ("int4 biases", 128)],
    "nested": [("int4 nested", 256), ("int4 nested", 128), ("int4 nested", 128)],
    "own tables": [("own table", 128), ("own table", 128), ("own table b16", 128)],
}


@pytest.mark.parametrize("name", MIXED)
def test_matrices_of_several_kinds_are_one(name):
    weights = [OTHERS[kind](rows, 128, seed) for seed, (kind, rows) in enumerate(MIXED[name])]
    whole, parts = pack_joined(weights)
    dense = torch.cat([weight.dequantize(torch.float32) for weight in weights])
    assert torch.equal(whole.dequantize(torch.float32), dense)
    assert torch.equal(whole.rows(100, 300, torch.float32), dense[100:300])
    assert (as_computed(whole.matrix) - dense).norm() <= 2**-11 * dense.norm()
    for part, weight in zip(parts, weights, strict=True):
        back = part.unpack()
        assert (type(back), back.scheme, back.dtype) == (type(weight), weight.scheme, weight.dtype)
        assert torch.equal(back.codes, weight.codes)
