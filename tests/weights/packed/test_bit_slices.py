"""Slices of bits: where each bit lies, and what the instructions make of the words."""

import re

import numpy as np
import pytest
import torch

from qmix.kernels.gpu import ptx
from qmix.weights.packed import lanes
from qmix.weights.packed.bit_slices import PAIRS, SLICE_BYTES, SLICES, fields
from qmix.weights.packed.tile_format import BYTE_ROWS, PANEL, TileFormat
from qmix.weights.packed.weight import pack
from tests.support.packed import affine, as_computed
from tests.support.ptx import inline_assembly

BITS = tuple(SLICES)


def drawn(*shape, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", BITS)
def test_each_bit_of_the_words_is_one_bit_of_one_code(bits):
    places = [
        (field.word, field.first_bit(code) + bit)
        for parts in fields(bits)
        for field in parts
        for code in range(2)
        for bit in range(field.width)
    ]
    assert sorted(places) == [(word, bit) for word in range(bits) for bit in range(32)]


@pytest.mark.parametrize("bits", BITS)
def test_what_is_rotated_lies_together_and_within_a_mantissa(bits):
    """The bits of a code are neighbours, in the same place of both halves, below bit 10."""
    for parts in fields(bits):
        assert sum(field.width for field in parts) == bits
        begin = parts[0].at
        for field in parts:
            assert field.at == begin + field.below
            for code in range(2):
                assert (field.first_bit(code) - field.rotation) % 32 == field.at + 16 * code
        assert begin + bits <= 10


def values_of(text, codes, bits):
    """What the instructions make of pairs of codes [lanes, 16, 2]: float16 of the same shape."""
    words = lanes._to_words(codes, bits).numpy().view(np.uint32)
    kept = [
        np.full(len(codes), word, np.uint32) for word in ptx.SLICED_WORDS[bits] for _ in range(4)
    ]
    found = inline_assembly.run(text, [*np.ascontiguousarray(words.T), *kept], PAIRS)
    return np.stack(found, 1).view(np.float16).reshape(codes.shape)


@pytest.mark.parametrize("bits", BITS)
def test_the_instructions_give_every_code_exactly(bits):
    codes = drawn(4096, PAIRS, 2, bits=bits)
    found = values_of(ptx.SLICED_INSTRUCTIONS[bits], codes, bits)
    assert (found == codes.numpy().astype(np.float16) - (1 << bits - 1)).all()


MISTAKES = {
    "a mask": (r"(lop3\.b32 \$\d+, \S+ 0x)(\w{8})", lambda n: n << 1 & 0x03FF03FF),
    "a constant": (r"(mov\.b32 m\d, 0x)(\w{8})", lambda n: n + 1),
    "a rotation": (r"(shf\.r\.wrap\.b32 t\d, \$\d+, \$\d+, )(\d+)", lambda n: n ^ 1),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_at_any_place_shows(mistake, bits):
    pattern, change = MISTAKES[mistake]
    text, codes = ptx.SLICED_INSTRUCTIONS[bits], drawn(256, PAIRS, 2, bits=bits)
    places = list(re.finditer(pattern, text))
    assert len(places) >= 2
    for place in places:
        base = 16 if place[1].endswith("0x") else 10
        number = change(int(place[2], base))
        new = f"{number:08x}" if base == 16 else str(number)
        wrong = text[: place.start(2)] + new + text[place.end(2) :]
        found = values_of(wrong, codes, bits)
        assert (found != codes.numpy().astype(np.float16) - (1 << bits - 1)).any(), place[0]


def test_instructions_a_weight():
    count = {
        bits: sum(line[0] not in "{}." and not line.startswith("mov") for line in text.splitlines())
        for bits, text in ptx.SLICED_INSTRUCTIONS.items()
    }
    assert count == {2: 34, 3: 53, 5: 59, 6: 58}  # for 32 weights


FORMATS = [
    *(TileFormat(kind, 128) for kind in ("int2", "int3", "int5", "int6")),
    *(TileFormat(kind, inputs) for kind in ("int4", "int8") for inputs in (64, 32)),
]


@pytest.mark.parametrize("tile_format", FORMATS, ids=str)
def test_codes_come_back_from_lanes(tile_format):
    shape = 2 * BYTE_ROWS, 3 * tile_format.inputs
    low, high = (drawn(*shape, bits=tile_format.bits, seed=seed) for seed in (1, 2))
    parts = lanes.to_lanes(low, high, tile_format)
    section = torch.cat(parts, 2)
    assert section.shape == (2, 3, tile_format.code_bytes)
    for back, codes in zip(lanes.from_lanes(section, tile_format), (low, high), strict=True):
        assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("how", ["symmetric", "zeros", "biases", "nested"])
@pytest.mark.parametrize("group", [16, 32, 48, 64, 128, 384])
def test_a_weight_comes_back_bit_for_bit(bits, how, group):
    weight = affine(128, 384, bits, bits=bits, group=group, how=how)
    packed = pack(weight)
    assert packed.matrix.format.sliced
    assert packed.matrix.blob.nbytes == packed.matrix.format.matrix_bytes((128, 384))
    back = packed.unpack()
    assert back.scheme == weight.scheme
    assert torch.equal(back.codes, weight.codes)
    meant = weight.dequantize(torch.float32)
    assert torch.equal(back.dequantize(torch.float32), meant)
    found = as_computed(packed.matrix)  # scales, zeros and their product in float16
    assert (found - meant).norm() <= 2**-10 * meant.norm()


@pytest.mark.parametrize("bits", BITS)
def test_a_lane_has_the_codes_of_its_matrix_operand(bits):
    """Byte by byte, one code that is not zero: of which word of which lane."""
    tile_format = TileFormat(f"int{bits}", 128)
    assert tile_format.code_bytes == bits * SLICE_BYTES == PANEL * 128 * bits // 8
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        row, column, plane = (
            int(torch.randint(0, end, (), generator=generator)) for end in (BYTE_ROWS, 128, 2)
        )
        planes = torch.zeros(2, BYTE_ROWS, 128, dtype=torch.uint8)
        planes[plane, row, column] = (1 << bits) - 1
        (part,) = lanes.to_lanes(*planes, tile_format)
        words = part.flatten().view(torch.int32).view(bits, 4, 8, 4, 2, 2).numpy().view(np.uint32)
        warp, r, g = row // 16, row // 8 % 2, row % 8
        block, j, c, t, p = (
            column // 32, column // 16 % 2, column // 8 % 2, column // 2 % 4, column % 2
        )  # fmt: skip
        for field in fields(bits)[4 * block + 2 * plane + j]:
            mask = (1 << field.width) - 1 << field.first_bit(p)
            assert words[field.word, warp, g, t, c, r] & mask == mask
            words[field.word, warp, g, t, c, r] &= ~np.uint32(mask)
        assert not words.any()
