"""The description that packing and planning share, against what packing makes."""

from dataclasses import replace

import pytest

from qmix.errors import UnsupportedError
from qmix.weights.expert import Expert
from qmix.weights.packed import weight as packed
from qmix.weights.packed.layout import pack_expert, pack_matrix
from qmix.weights.packed.packed_shapes import (
    expert_format,
    joined,
    matrix_format,
    padded,
    table_formats,
)
from qmix.weights.packed.planes import spec_of
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
