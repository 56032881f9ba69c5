"""The description that packing and planning share, against what packing makes."""

from dataclasses import replace

import pytest
import torch

from qmix.errors import UnsupportedError
from qmix.weights.expert import Expert
from qmix.weights.packed import weight as packed
from qmix.weights.packed.layout import pack_expert, pack_matrix
from qmix.weights.packed.packed_shapes import (
    MatrixSpec,
    expert_format,
    joined,
    matrix_format,
    padded,
    table_formats,
)
from qmix.weights.packed.planes import spec_of
from qmix.weights.packed.tile_format import PANEL
from tests.support.packed import act_order, affine, int4, nf4

WEIGHTS = {
    "nf4": nf4(256, 128),
    "nf4 block 32": nf4(256, 128, block=32),
    "int4": int4(256, 128),
    "int4 act-order": act_order(256, 128),
    "odd rows": nf4(192, 128),
    "odd inputs": int4(256, 80, group=80),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_matrix_is_packed_if_and_as_the_description_says(name):
    weight = WEIGHTS[name]
    spec = padded(spec_of(weight))
    try:
        described = matrix_format(spec)
    except UnsupportedError:
        with pytest.raises(UnsupportedError):
            pack_matrix(weight)
        return
    matrix = pack_matrix(weight)
    assert matrix.format == described
    assert matrix.blob.nbytes == described.matrix_bytes(spec.shape)


@pytest.mark.parametrize(
    ("parts", "fits"),
    [
        ([nf4(64, 128), nf4(32, 128, 1), nf4(32, 128, 2)], True),
        ([int4(64, 128), int4(32, 128, 1), int4(32, 128, 2)], True),
        ([nf4(64, 128), nf4(32, 128, 1, block=128), nf4(32, 128, 2)], True),
        ([int4(64, 128), affine(32, 128, 1, bits=8), affine(32, 128, 2, bits=6)], True),
        ([affine(64, 128, bits=2), affine(32, 128, 1, bits=3), int4(32, 128, 2)], True),
        ([affine(64, 128, bits=5), affine(32, 128, 1, bits=6), affine(32, 128, 2, bits=3)], True),
        ([nf4(64, 128), int4(32, 128, 1), nf4(32, 128, 2)], False),
    ],
)
def test_matrices_are_joined_if_and_as_the_description_says(parts, fits):
    specs = [spec_of(part) for part in parts]
    if not fits:
        with pytest.raises(UnsupportedError, match="no packed layout"):
            joined(specs)
        with pytest.raises(UnsupportedError, match="no packed layout"):
            packed.pack_joined(parts)
        return
    whole, _ = packed.pack_joined(parts)
    described = joined(specs)
    assert whole.matrix.shape == described.shape == (128, 128)
    assert whole.matrix.format == matrix_format(described)


def test_a_block_of_two_matrices_is_not_joined():
    spec = replace(spec_of(nf4(1, 64)), shape=(1, 96))
    with pytest.raises(UnsupportedError, match="no packed layout"):
        joined([spec, spec])


@pytest.mark.parametrize("make", [nf4, int4])
def test_an_expert_is_as_long_as_the_description_says(make):
    expert = Expert(make(64, 128), make(128, 64, 1), make(64, 128, 2))
    described = expert_format(*(spec_of(w) for w in (expert.w1, expert.w2, expert.w3)))
    blob = pack_expert(expert)
    assert blob.format == described
    assert blob.blob.nbytes == described.nbytes
    assert table_formats([[described] * 4] * 2) == (described,) * 4
    with pytest.raises(UnsupportedError, match="powers of two"):
        table_formats([[described] * 3])
    other = replace(described, shape=(256, 128))
    with pytest.raises(UnsupportedError, match="one shape"):
        table_formats([[described, other]])


def spec(kind, inputs=256, group=128):
    return MatrixSpec(kind, (128, inputs), group, symmetric=True)


@pytest.mark.parametrize(
    ("kinds", "kind"),
    [
        (("int2", "int2", "int2"), "int2"),
        (("int2", "int3", "int2"), "int3"),
        (("int2", "int4", "int3"), "int4"),
        (("int5", "int4", "int4"), "int5"),
        (("int6", "int8", "int3"), "int8"),
        (("iq4", "int6", "int6"), "int8"),
    ],
)
def test_joined_matrices_take_the_narrowest_form_that_holds_all(kinds, kind):
    assert matrix_format(joined([spec(each) for each in kinds])).kind == kind


@pytest.mark.parametrize("kind", ["int2", "int3", "int5", "int6"])
def test_slices_of_bits_want_128_inputs(kind):
    assert matrix_format(spec(kind)).bits == int(kind[3:])
    wide = {"int2": "int4", "int3": "int4"}.get(kind, "int8")
    assert matrix_format(spec(kind, 192, 64)).kind == wide
    groups = {16: 16, 32: 32, 48: 16, 64: 64, 96: 32, 128: 0, 256: 0, 384: 0}
    for group, shared in groups.items():
        found = matrix_format(spec(kind, 768, group))
        assert (found.kind, found.inputs, found.group) == (kind, 128, shared)
    with pytest.raises(UnsupportedError, match="no packed layout"):
        matrix_format(spec(kind, 384, 24))


def test_bits_a_weight_of_slices():
    """As stored, with scales of 16 bits, and as many for zeros."""
    bits = {
        ("int2", 64, True): 2.25,
        ("int2", 16, False): 4.0,
        ("int3", 128, True): 3.125,
        ("int3", 16, True): 4.0,
        ("int5", 32, False): 6.0,
        ("int6", 16, True): 7.0,
    }
    for (kind, group, symmetric), wanted in bits.items():
        found = matrix_format(replace(spec(kind, group=group), symmetric=symmetric))
        assert 8 * found.tile_bytes == wanted * PANEL * found.inputs


def test_w1_and_w3_of_two_kinds_are_packed_in_the_wider():
    w1, w3 = affine(64, 128, bits=2), affine(64, 128, 2, bits=3)
    expert = Expert(w1, affine(128, 64, 1, bits=3), w3)
    packed_expert = pack_expert(expert)
    assert packed_expert.format.gate_up.kind == "int3"
    assert packed_expert.format.down.kind == "int4"  # of 64 inputs
    one = packed.PackedExperts.pack([expert])[0]
    for name in ("w1", "w2", "w3"):
        back, weight = getattr(one, name).unpack(), getattr(expert, name)
        assert back.scheme == weight.scheme
        assert torch.equal(back.codes, weight.codes)
