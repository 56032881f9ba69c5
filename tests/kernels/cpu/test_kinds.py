"""Both kinds of weight in all their forms, on every instruction set, against float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from qmix import kernels
from qmix.kernels.cpu.library import library
from qmix.weights.affine import Affine
from tests.support.cpu_kernels import SCALES, random_affine, random_table, seeded

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (16, 32, 64, 128, 256, 768)
FORMS = {
    "symmetric": {},
    "zeros": {"zeros": torch.uint8},
    "float zeros": {"zeros": torch.float16},
    "biases": {"biases": torch.float16},
    "nested biases": {"scales": "6 bits of 8", "biases": "6 bits of 8"},
}
LAYOUTS = {
    "NVFP4": partial(random_table, kind="e2m1", block=16, scales="8 bits of all"),
    "MXFP4": partial(random_table, kind="e2m1", block=32, scales="8 bits of all"),
    "MLX": partial(random_affine, group=64, scales=torch.bfloat16, biases=torch.bfloat16),
    "HQQ": partial(random_affine, group=64, zeros=torch.float16),
    "Q4_0": partial(random_affine, group=32),
    "Q4_1": partial(random_affine, group=32, biases=torch.float16),
    "Q4_K": partial(random_affine, group=32, scales="6 bits of 8", biases="6 bits of 8"),
    "IQ4_NL": partial(random_table, kind="iq4", block=32, scales=torch.float16),
    "IQ4_XS": partial(random_table, kind="iq4", block=32, scales="6 bits of 8"),
    "Q5_0": partial(random_affine, bits=5, group=32),
    "Q5_K": partial(random_affine, bits=5, group=32, scales="6 bits of 8", biases="6 bits of 8"),
    "Q6_K": partial(random_affine, bits=6, group=16, scales="8 bits of 16"),
    "Q8_0": partial(random_affine, bits=8, group=32),
    "Q2_K": partial(random_affine, bits=2, group=16, scales="6 bits of 16", biases="6 bits of 16"),
    "Q3_K": partial(random_affine, bits=3, group=16, scales="6 bits of 16"),
    "IQ3_XXS": partial(random_table, kind="iq3_xxs", block=32, scales="6 bits of 8"),
    "IQ2_XS": partial(random_table, kind="iq2", block=16, scales="6 bits of 16"),
}


def check(weight, tokens, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """Within float32's rounding, or for 16 bits that of inputs to 2^-15 of a chunk's largest."""
    dense = weight.dequantize(torch.float32).double()
    before = library().fallbacks
    for dtype in dtypes:
        for count in tokens:
            x = torch.randn(count, weight.shape[1], generator=seeded(count)).to(dtype)
            out, exact = kernels.linear(x, weight), x.double() @ dense.T
            assert (out.dtype, out.shape) == (dtype, exact.shape)
            size = x.double().norm(dim=1, keepdim=True) * dense.norm(dim=1)
            bound = (4e-7 if dtype == torch.float32 else 4e-5) * size
            unavoidable = (exact.to(dtype).double() - exact).abs()
            error = (out.double() - exact).abs()
            assert (error <= 2 * unavoidable + bound).all(), (dtype, count, (error / size).max())
    return library().fallbacks - before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_affine_weights_of_every_group(isa, bits, form):
    for group in GROUPS:
        if "6 bits of 8" in FORMS[form].values() and 768 // group % 4:
            continue  # codes of six bits come by four
        check(random_affine(11, 768, bits, group, **FORMS[form]), (1, 3, 6))


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_and_biases_of_every_kind(isa, bits, scales):
    for group in (16, 32, 64):
        check(random_affine(9, 1792, bits, group, scales=scales), (1, 5))
        check(random_affine(9, 1792, bits, group, biases=scales), (1, 5))


@pytest.mark.parametrize("high_first", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "e2m1", "iq4"])
def test_tables_of_every_block(isa, kind, high_first):
    for block in (16, 32, 64, 128, 256, 1024):
        for scales in SCALES:
            if block < 1024 or "6 bits" not in str(scales):
                weight = random_table(10, 1024, kind, block, scales, high_first)
                check(weight, (1, 6), (torch.float32, torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_at_every_number_of_tokens(isa, layout):
    """Odd rows; inputs that end within a chunk, where codes of six bits allow it."""
    k = 384 if layout in ("Q4_K", "Q5_K", "IQ4_XS", "IQ3_XXS") else 320
    fallbacks = check(LAYOUTS[layout](7, k), range(1, 41), (torch.float32, torch.bfloat16))
    assert fallbacks == (80 if isa == "torch" else 0)
    for n, k in ((1, 256), (33, 768), (130, 2304)):
        check(LAYOUTS[layout](n, k), (1, 2, 3, 4, 17))


@pytest.mark.parametrize("bits", BITS)
def test_groups_that_fit_no_vector(isa, bits):
    for k, group in ((24, 8), (40, 40), (120, 24), (1032, 1032), (80, 40)):
        for form in (FORMS["symmetric"], FORMS["zeros"], FORMS["biases"]):
            check(random_affine(5, k, bits, group, **form), (1, 5, 13), (torch.float32,))


@pytest.mark.parametrize("bits", BITS)
def test_act_order_permutes_the_activations(isa, bits):
    weight = random_affine(50, 512, bits, 128, zeros=torch.uint8)
    check(replace(weight, perm=torch.randperm(512, generator=seeded(3)).int()), (1, 13))


def test_groups_without_scale_are_their_biases(isa):
    """What k-quants make of a group whose values are all alike."""
    weight = random_affine(50, 512, 4, 32, biases=torch.float16)
    weight = replace(weight, scales=torch.zeros_like(weight.scales))
    check(weight, (1, 4, 13))


def test_tables_of_integers_and_halves_are_exact_in_integers(isa):
    for kind in ("e2m1", "iq4"):
        weight = random_table(16, 256, kind, 256, torch.float32)
        weight.scales.fill_(1.0)
        x = torch.zeros(1, 256).bfloat16()
        x[0, 3], x[0, 200] = 1, -1
        exact = x.double() @ weight.dequantize(torch.float32).double().T
        error = (kernels.linear(x, weight).double() - exact.bfloat16().double()).abs().max()
        # Where small tables are codes above a base, the base is taken off in float32.
        based = kind == "e2m1" and isa in ("neon", "i8mm", "avx2", "avx_vnni")
        assert error <= (2e-6 if based else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_on_a_device_have_the_bits_of_the_cpu(layout):
    """What a GPU multiplies where no Triton kernel takes a weight."""
    weight = LAYOUTS[layout](6, 384)
    blocks = 6 if isinstance(weight, Affine) else 6 * 384 // weight.block_size
    for dtype in (torch.float32, torch.bfloat16):
        on_device = weight._decode(0, blocks, dtype).view(6, 384)
        assert torch.equal(on_device, weight.dequantize(dtype))
