"""NF4: our codes and scales are bitsandbytes' bytes, and what they decode to is theirs too."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import CheckpointError, UsageError
from qmix.formats.layouts import bnb as layout
from qmix.weights import nf4
from qmix.weights.scales import NestedScales
from qmix.weights.scheme import DENSE, NF4_BLOCK_SIZES, Scheme
from qmix.weights.slabs import decoded
from qmix.weights.table import NF4_VALUES
from tests.support import exact
from tests.support.oracles import eager_bitsandbytes
from tests.support.process import succeeds
from tests.support.soak import one_in

bnb = eager_bitsandbytes().functional

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = {2: torch.int16, 4: torch.int32}


def scheme(block=64, double=True):
    return Scheme(kind="nf4", block_size=block, double_quant=double)


def random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def oracle(weight, block=64, double=True):
    return bnb.quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type="nf4")


def assert_equal_bytes(weight, block=64, double=True):
    """Codes, scales, nested scales, tables and offset of both quantizers are the same bits."""
    codes, state = oracle(weight, block, double)
    ours = nf4.quantize(weight, scheme(block, double))
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.table, state.code)
    assert ours.out_dtype == state.dtype
    assert ours.out_shape == tuple(state.shape)
    if double:
        assert torch.equal(ours.scales.codes, state.absmax)
        assert same_bits(ours.scales.outer, state.state2.absmax)
        assert torch.equal(ours.scales.map, state.state2.code)
        assert ours.scales.offset == state.offset.item()
    else:
        assert same_bits(ours.scales, state.absmax)
    return ours, codes, state


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.view(BITS[a.element_size()]), b.view(BITS[b.element_size()])
    )


def definition(weight, dtype):
    """`table[code] * absmax[block]` in float32, cast once: written apart from the decoder."""
    count = weight.shape[0] * weight.shape[1]
    absmax = weight.scales
    if isinstance(absmax, NestedScales):
        group = torch.arange(absmax.codes.numel()) // 256
        absmax = absmax.map[absmax.codes.long()] * absmax.outer[group] + absmax.offset
    code = torch.stack((weight.codes >> 4, weight.codes & 15), 1).view(-1)[:count].long()
    block = torch.arange(count) // weight.block_size
    return (weight.table[code] * absmax[block]).to(dtype).view(weight.shape)


def zero_blocks(dtype):
    weight = random(48, 256)
    weight.view(-1, 64)[::3] = 0
    weight[40:] = 0
    return weight.to(dtype)


def outliers(dtype):
    weight = random(64, 512) * 0.02
    weight[:, ::97] *= 300
    weight[3, 5] = -60000
    return weight.to(dtype)


def denormal(dtype):
    smallest = torch.finfo(dtype).smallest_normal
    weight = random(64, 512) * smallest
    weight[::2] *= 1e-3
    return weight.to(dtype)


def ties(dtype):
    """Every element lies on a bound between two codes, or next to one."""
    values = torch.tensor(NF4_VALUES)
    bounds = (values[:-1] + values[1:]) / 2
    near = torch.stack(
        [bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))]
    ).view(-1)
    blocks = near.repeat(40 * 64)[: 40 * 64].view(40, 64).clone()
    blocks[:, 0] = 1
    return (blocks * torch.arange(1, 41)[:, None].float()).to(dtype)


MATRICES = {
    "random": lambda dtype: random(96, 512).mul(0.02).to(dtype),
    "zero blocks": zero_blocks,
    "outliers": outliers,
    "denormals": denormal,
    "ties": ties,
    "all zero": lambda dtype: torch.zeros(8, 128, dtype=dtype),
    "one value": lambda dtype: torch.full((64, 512), -0.37, dtype=dtype),
    "one row": lambda dtype: random(1, 4096).to(dtype),
    "one element": lambda dtype: torch.full((1, 1), -3.0, dtype=dtype),
    "odd size": lambda dtype: random(3, 43).to(dtype),
    "short last block of zeros": lambda dtype: torch.cat([random(1, 64), torch.zeros(1, 7)], 1).to(
        dtype
    ),
}


@pytest.mark.parametrize("double", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_bytes_equal_those_of_bitsandbytes(name, dtype, double):
    assert_equal_bytes(MATRICES[name](dtype), double=double)


def test_a_short_last_block_is_divided_not_multiplied_by_a_reciprocal():
    """The two differ next to the bounds between codes."""
    near = ties(torch.float32)[0, :46]
    for absmax in range(3, 103):
        assert_equal_bytes((near * absmax)[None], double=False)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    block=st.sampled_from(NF4_BLOCK_SIZES),
    dtype=st.sampled_from(DTYPES),
    double=st.booleans(),
    exponent=st.integers(-40, 14),
    seed=st.integers(0, 1 << 30),
)
def test_bytes_equal_for_any_shape_block_and_scale(
    rows, columns, block, dtype, double, exponent, seed
):
    weight = random(rows, columns, seed) * 10.0**exponent
    weight = weight.clamp(-60000, 60000).to(dtype)
    ours, _, _ = assert_equal_bytes(weight, block, double)
    for out in DTYPES:
        assert same_bits(ours.dequantize(out), definition(ours, out))


@given(st.data())
def test_bytes_equal_for_any_bit_pattern(data):
    """Neighbouring blocks of any finite float32, denormals and huge values included."""
    patterns = data.draw(st.lists(st.integers(0, (1 << 32) - 1), min_size=64, max_size=200))
    weight = torch.from_numpy(np.array(patterns, np.uint32).view(np.float32))[None]
    weight = torch.where(weight.isfinite(), weight, torch.zeros(()))
    assert_equal_bytes(weight, 32, double=False)


def test_nested_scales_equal_where_bitsandbytes_rounds_to_a_step_first():
    """100,000 scales over six decades; rounding each to the nearest of the map differs in some."""
    scales = torch.exp(random(100_000, 1) * 2.3)
    weight = torch.zeros(100_000, 64)
    weight[:, 17:18] = scales
    ours, _, _ = assert_equal_bytes(weight)
    nested = ours.scales
    centred = torch.nn.functional.pad(scales[:, 0] - nested.offset, (0, 96)).view(-1, 256)
    exactly = (centred / nested.outer[:, None]).view(-1)[:100_000]
    bounds = (nested.map[:-1] + nested.map[1:]) / 2
    nearest = torch.bucketize(exactly, bounds).to(torch.uint8)
    assert 0 < (nearest != nested.codes).sum() < 1000


def test_scales_that_all_equal_their_mean_decode_to_it():
    weight = torch.zeros(300, 64)
    weight[:, 9] = 0.75
    ours, _, _ = assert_equal_bytes(weight)
    assert not ours.scales.codes.any()
    assert torch.equal(ours.dequantize(), weight)


def test_a_block_of_zeros_decodes_to_zeros():
    weight = zero_blocks(torch.bfloat16)
    for double in (True, False):
        restored = nf4.quantize(weight, scheme(double=double)).dequantize()
        assert restored.isfinite().all()
        assert not restored.view(-1, 64)[::3].any()
        assert not restored[40:].any()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_changes_nothing_but_the_last_bit_of_the_mean(threads):
    """65536 blocks: torch.mean splits from 32768 on, in bitsandbytes as here."""
    weight = random(1024, 4096)
    before = torch.get_num_threads()
    plain = nf4.quantize(weight, scheme(double=False))
    try:
        torch.set_num_threads(threads)
        assert_equal_bytes(weight)
        again = nf4.quantize(weight, scheme(double=False))
        restored = again.dequantize()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again.codes, plain.codes)
    assert torch.equal(again.scales, plain.scales)
    assert torch.equal(restored, plain.dequantize())


@pytest.mark.parametrize("columns", [4096, 4097, 96])
def test_a_strided_weight_equals_its_copy(columns):
    weight = random(columns, 700).bfloat16().T
    assert not weight.is_contiguous()
    strided, copied = nf4.quantize(weight), nf4.quantize(weight.contiguous())
    assert torch.equal(strided.codes, copied.codes)
    assert torch.equal(strided.scales.codes, copied.scales.codes)


def test_parameters_and_inference_tensors_are_quantized_and_decoded():
    weight = random(2048, 2304)  # more than one thread's share
    expected = nf4.quantize(weight)
    trained = nf4.quantize(torch.nn.Parameter(weight))
    assert torch.equal(trained.codes, expected.codes)
    with torch.inference_mode():
        inferred = nf4.quantize(weight * 1)
        for dtype in DTYPES:
            assert torch.equal(inferred.dequantize(dtype), expected.dequantize(dtype))
    assert torch.equal(inferred.dequantize(), expected.dequantize())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, 1), (699, 4096)], ids=str)
def test_a_weight_that_is_not_finite_is_refused_by_name(bad, dtype, place):
    weight = torch.ones(700, 4097, dtype=dtype)
    weight[place] = bad
    with pytest.raises(CheckpointError, match=r"^a\.safetensors: w1: NaN"):
        nf4.quantize(weight, where="a.safetensors: w1")


def test_scales_whose_mean_overflows_are_refused():
    with pytest.raises(CheckpointError, match="mean of their scales"):
        nf4.quantize(torch.full((64, 64), 3e38), where="w1")


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(64),
        torch.ones(2, 64, dtype=torch.float64),
        torch.ones(0, 64),
        torch.ones(1, 1).int(),
    ],
    ids=["one dimension", "float64", "empty", "integers"],
)
def test_what_is_no_weight_is_refused(weight):
    with pytest.raises(CheckpointError, match="w1: not a weight"):
        nf4.quantize(weight, where="w1")


@pytest.mark.parametrize("refused", [DENSE, scheme(48), scheme(16), scheme(8192)], ids=str)
def test_a_scheme_that_is_not_nf4_is_refused(refused):
    with pytest.raises(UsageError, match="32, 64, 128"):
        nf4.quantize(torch.ones(2, 64), refused)


@pytest.mark.parametrize("double", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoded_values_equal_those_of_bitsandbytes(dtype, double):
    # Whole blocks a row: bitsandbytes 0.50.2 on the CPU misplaces the scales of blocks that
    # straddle rows, and flushes denormal bfloat16 results to zero where the processor has AVX-512.
    for block in (32, 64, 256):
        for weight in (random(300, 1024).bfloat16(), outliers(torch.float32)):
            ours, codes, state = assert_equal_bytes(weight, block, double)
            state.dtype = dtype
            assert same_bits(ours.dequantize(dtype), bnb.dequantize_4bit(codes, state))


@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 300),
    block=st.sampled_from(NF4_BLOCK_SIZES),
    double=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_range_of_rows_equals_those_rows_of_the_whole(
    rows, columns, block, double, dtype, data
):
    weight = nf4.quantize(random(rows, columns), scheme(block, double))
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    part = weight.rows(start, stop, dtype)
    assert part.shape == (stop - start, columns)
    assert part.is_contiguous()
    assert same_bits(part, definition(weight, dtype)[start:stop])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 96), (3, 43), (2048, 5000)], ids=str)
def test_the_path_of_other_devices_equals_that_of_the_cpu(shape, dtype):
    for double in (True, False):
        weight = nf4.quantize(random(*shape), scheme(double=double))
        blocks = -(-shape[0] * shape[1] // 64)
        for start, stop in ((0, blocks), (blocks // 3, blocks // 2)):
            ours = decoded(start, stop, 64, dtype, weight._decode_slab).view(-1)
            assert same_bits(weight._decode(start, stop, dtype), ours)


def test_another_table_is_obeyed():
    weight = nf4.quantize(random(4, 128))
    doubled = replace(weight, table=weight.table * 2)
    assert torch.equal(doubled.dequantize(), weight.dequantize() * 2)


def test_rounding_back_what_was_decoded_changes_no_code():
    for dtype in DTYPES:
        first = nf4.quantize(random(64, 512).to(dtype), scheme(double=False))
        again = nf4.quantize(first.dequantize(), scheme(double=False))
        assert torch.equal(first.codes, again.codes)
        assert torch.equal(first.scales, again.scales)


def test_the_error_of_a_gaussian_weight_is_that_of_nf4():
    """9.2 % of its norm in blocks of 64: the data type itself, not merely something close to it."""
    weight = random(1024, 1024)
    error = (nf4.quantize(weight).dequantize() - weight).norm() / weight.norm()
    assert error.item() == pytest.approx(0.0920, abs=0.0003)


def fixed_matrix(rows, columns):
    """Integers below 2^11 times 2^-14, a row of zeros and an outlier: sums of scales are exact."""
    drawn = exact.bell(exact.mix(5, 0, rows * columns)) >> 6
    weight = torch.from_numpy(drawn.astype(np.float32) * np.float32(2.0**-14)).view(rows, columns)
    weight[7] = 0
    weight[9, 3] = 4.0
    return weight


@pytest.mark.parametrize(
    ("dtype", "shape", "block", "double", "expected"),
    [
        (
            torch.bfloat16,
            (160, 256),
            64,
            True,
            "4825807f62c84631cac6b07af0128dbc3539e4abd31660f2421dd54d83684bfe",
        ),
        (
            torch.float16,
            (33, 97),
            64,
            True,
            "0d6f4ae7ceb6b066f43b9f04ad0b09b665a70435bf6b1d8bdcb210286b5e6603",
        ),
        (
            torch.float32,
            (33, 97),
            128,
            False,
            "03c94aee33385d09d573d18abcb9b6eaafedf7944291cc518461b131f9a10bd0",
        ),
    ],
)
def test_the_bytes_of_a_fixed_matrix_never_change(dtype, shape, block, double, expected):
    weight = nf4.quantize(fixed_matrix(*shape).to(dtype), scheme(block, double))
    digest = hashlib.sha256()
    for name, tensor in layout.pack(weight, "p").items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == expected


MEMORY = """
import resource, sys, torch
from qmix.weights import nf4
w = torch.empty(14336, 4096, dtype=torch.bfloat16).normal_(0, 0.02)
if sys.argv[1] == "strided":
    w = w.view(4096, 14336).T
nf4.quantize(torch.ones(64, 64))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
packed = nf4.quantize(w)
print(peak() - before - (packed.nbytes + 4 * w.numel() // 64) / 2**20)
"""


@pytest.mark.parametrize("layout", one_in(2, ["strided", "contiguous"]))
def test_a_large_matrix_is_quantized_within_64_mb(layout):
    """Beyond the input, the codes and the float32 scales."""
    assert float(succeeds(MEMORY, layout)) < 64
