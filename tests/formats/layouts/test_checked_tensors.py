"""Whatever a file holds, the readers of the integer layouts give a weight or a QmixError."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import QmixError
from qmix.formats.layouts import awq, compressed_tensors, gptq
from qmix.formats.layouts.checked_tensors import unpack_words
from qmix.formats.layouts.gptq_config import GPTQConfig
from tests.support import packers
from tests.support.packers import plain

P = "model.layers.0.block_sparse_moe.experts.0.w1"
SHAPE = (16, 64)
WEIGHT = plain(SHAPE, 32, symmetric=False)
WIDE = plain(SHAPE, 32, bits=8, symmetric=False)
FILES = {
    "gptq": packers.gptq(WEIGHT, P),
    "gptq8": packers.gptq(WIDE, P),
    "compressed8": packers.compressed(WIDE, P, symmetric=False),
    "awq": packers.awq(WEIGHT, P),
    "compressed": packers.compressed(WEIGHT, P, symmetric=False),
}
SETTINGS = GPTQConfig(symmetric=False).for_module(P)
READERS = {
    "gptq": lambda t: gptq.unpack(t, P, "f", SHAPE, SETTINGS),
    "gptq8": lambda t: gptq.unpack(t, P, "f", SHAPE, SETTINGS),
    "compressed8": lambda t: compressed_tensors.unpack(t, P, "f", SHAPE),
    "awq": lambda t: awq.unpack(t, P, "f", SHAPE),
    "compressed": lambda t: compressed_tensors.unpack(t, P, "f", SHAPE),
}
DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16,
          torch.bfloat16, torch.float32, torch.float64, torch.bool)  # fmt: skip
FORMS = (
    lambda t: t,
    lambda t: t.reshape(-1),
    lambda t: t.t().contiguous(),
    lambda t: t[None],
    lambda t: t[:0],
    lambda t: t.reshape(-1)[0],
    lambda t: t.repeat(2, *[1] * (t.dim() - 1)),
    lambda t: t.t(),  # not contiguous
)


@given(
    layout=st.sampled_from(sorted(FILES)),
    place=st.integers(0, 3),
    dtype=st.sampled_from((None, *DTYPES)),
    form=st.sampled_from(FORMS),
    index=st.integers(0, 1 << 20),
    value=st.sampled_from((None, 0, -1, 1, 2, 127, -(2**31), 2**31 - 1)),
)
def test_a_weight_or_an_error_that_names_the_tensor(layout, place, dtype, form, index, value):
    tensors = {name: tensor.clone() for name, tensor in FILES[layout].items()}
    name = sorted(tensors)[place % len(tensors)]
    tensor = tensors[name]
    if value is not None:
        limits = torch.finfo if tensor.dtype.is_floating_point else torch.iinfo
        low, high = limits(tensor.dtype).min, limits(tensor.dtype).max
        tensor.view(-1)[index % tensor.numel()] = min(max(value, low), high)
    tensors[name] = form(tensor if dtype is None else tensor.to(dtype))
    problem = None
    try:
        weight = READERS[layout](tensors)
    except QmixError as error:
        problem = error
    if problem is not None:
        assert P in str(problem)
        assert problem.exit_code == 3
    else:
        assert weight.dequantize(torch.float32).shape == SHAPE
        assert weight.dequantize(torch.float32).isfinite().all()


@given(st.sampled_from((4, 8)), st.data())
def test_words_are_unpacked(bits, data):
    row = st.lists(st.integers(0, 2**bits - 1), min_size=32 // bits, max_size=32 // bits)
    codes = data.draw(st.lists(row, min_size=1, max_size=4))
    packed = torch.tensor([packers.word(word) for word in codes], dtype=torch.int32)
    assert unpack_words(packed, bits).tolist() == codes
    assert unpack_words(packed.long(), bits).tolist() == codes
