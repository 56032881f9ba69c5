"""FP4 in bitsandbytes' layout: the same values and the same bytes as bitsandbytes."""

from dataclasses import replace

import pytest
import torch

from qmix import kernels
from qmix.errors import CheckpointError
from qmix.formats import open_checkpoint
from qmix.formats.layouts import bnb, tensor_names
from qmix.formats.tensor_spec import TensorSpec
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.weights import nf4
from qmix.weights.scheme import Scheme
from qmix.weights.table import FP4_VALUES
from tests.support import packers
from tests.support.oracles import eager_bitsandbytes

functional = eager_bitsandbytes().functional

P = "model.layers.1.block_sparse_moe.experts.3.w2"


def theirs(weight, prefix=P, *, kind="fp4", double=True, storage=torch.uint8):
    """A file's tensors as they quantize, and the values that they read."""
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type=kind, quant_storage=storage
    )
    tensors = {f"{prefix}.weight": codes}
    tensors |= {f"{prefix}.weight.{n}": t for n, t in state.as_dict(packed=True).items()}
    return tensors, functional.dequantize_4bit(codes, state)


def random(rows, columns, dtype=torch.bfloat16, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[rows // 2] = 0
    return weight


@pytest.mark.parametrize("double", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_rounded_here_has_the_bytes_that_they_write(dtype, double):
    weight = random(63, 255, dtype)  # a short last block, with half a byte to spare
    weight[0, :16] = torch.tensor(FP4_VALUES) * weight[0].abs().max()
    tensors, _ = theirs(weight, double=double)
    ours = bnb.pack(nf4.quantize(weight, Scheme(kind="fp4", double_quant=double)), P)
    assert ours.keys() == tensors.keys()
    for name in ours:
        assert torch.equal(ours[name], tensors[name]), name


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("double", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_they_wrote_is_read_to_the_bits_that_they_read(dtype, double, storage):
    tensors, values = theirs(random(64, 256, dtype), double=double, storage=storage)
    assert set(tensor_names.bnb_names(P, tensors.keys())) == set(tensors)
    ours = bnb.unpack(tensors, P, "file")
    assert ours.kind == "fp4"
    assert ours.dtype == dtype
    assert ours.scheme == Scheme(kind="fp4", double_quant=double)
    assert torch.equal(ours.dequantize(), values)
    assert torch.equal(ours.to(torch.device("cpu")).rows(3, 5), values[3:5])
    again = bnb.pack(ours, P)
    assert again.keys() == tensors.keys()
    for name in again:
        assert again[name].numpy().tobytes() == tensors[name].view(torch.uint8).numpy().tobytes(), (
            name
        )


def test_the_scheme_and_the_plan():
    assert str(Scheme(kind="fp4")) == "fp4 b64 double-quant"
    assert Scheme(kind="fp4").bits_per_weight == Scheme(kind="nf4").bits_per_weight
    packed = bnb.pack(bnb.unpack(theirs(random(16, 64), double=False)[0], P, "file"), P)
    plan = bnb.packed_specs(P, (16, 64), Scheme(kind="fp4", double_quant=False), torch.bfloat16)
    assert plan == tuple(TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in packed.items())


def test_every_code_has_their_value():
    table = functional.get_4bit_type("fp4", device="cpu")
    assert torch.equal(table, torch.tensor(FP4_VALUES))


def test_another_table_or_a_second_state_is_refused():
    tensors, _ = theirs(random(16, 64))
    other, _ = theirs(random(16, 64), kind="nf4")
    table = {f"{P}.weight.quant_map": other[f"{P}.weight.quant_map"]}
    with pytest.raises(CheckpointError, match="quant_map: not the FP4 table"):
        bnb.unpack({**tensors, **table}, P, "file")
    with pytest.raises(CheckpointError, match="a second state"):
        bnb.unpack({**other, **tensors}, P, "file")
    blob = {P + bnb.STATE_FP4: other[P + bnb.STATE_NF4]}
    with pytest.raises(CheckpointError, match="wrong quant_type; expected fp4"):
        bnb.unpack({**tensors, **blob}, P, "file")


def test_a_product_is_that_of_the_values():
    tensors, values = theirs(random(96, 256, torch.float32))
    weight = bnb.unpack(tensors, P, "file")
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    oracle = x @ values.T
    assert (kernels.linear(x, weight) - oracle).abs().max() <= 1e-5 * oracle.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dense", [("lm_head",), ("gate", "lm_head")], ids=["4-bit gate", "dense gate"])  # fmt: skip
def test_a_mixtral_of_the_hub(tmp_path, kind, double, dense):
    values = {}

    def pack(weight, prefix):
        tensors, values[f"{prefix}.weight"] = theirs(
            weight.meant(), prefix, kind=kind, double=double
        )
        return tensors

    model = packers.checkpoint(tmp_path, pack, {"load_in_4bit": True}, dense=dense)
    model.load_state_dict(values, strict=False)
    ids = torch.tensor([[5, 6, 7, 99, 3]])
    loaded = MixtralForCausalLM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert (loaded(input_ids=ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    loaded.save_pretrained(tmp_path / "again")
    first, second = open_checkpoint(tmp_path), open_checkpoint(tmp_path / "again")
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.stored_names)


def test_nf4_stays_nf4():
    weight = nf4.quantize(random(16, 64))
    assert weight.scheme.kind == "nf4"
    assert replace(weight, block_size=64).scheme == weight.scheme
