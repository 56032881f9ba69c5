"""What gptqmodel 7.7.0 and AutoGPTQ 0.7.1 packed, against the values that they read back.

golden/make_gptqmodel.py made the files. The other direction, gptqmodel reading what qmix wrote, is
golden/check_gptqmodel.py.
"""

import re

import pytest
import torch
from safetensors.torch import load_file

from qmix.formats import open_checkpoint
from qmix.formats.layouts import awq, gptq, gptq_config
from qmix.models.causal_lm import MixtralForCausalLM
from tests.support import exact
from tests.support.models import GOLDEN

STORED = load_file(GOLDEN / "gptqmodel-7.7.0.safetensors")
OLDER = load_file(GOLDEN / "auto-gptq-0.7.1.safetensors")
DIRECTORY = GOLDEN / "gptqmodel-7.7.0"
SHAPE = (8, 256)
GPTQ_CASES = sorted({name.partition(".")[0] for name in STORED if name.startswith("gptq-")})


def bits_of(case):
    return 8 if "8bit" in case else 4


def gptq_tensors(case, version):
    names = ("qweight", "scales", "g_idx")
    tensors = {f"{case}.{name}": STORED[f"{case}.{name}"] for name in names}
    return {**tensors, f"{case}.qzeros": STORED[f"{case}.qzeros.v{version}"]}


def settings_of(case, version):
    document = {
        "bits": bits_of(case),
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "group_size": int(re.search(r"group(-?\d+)-", case)[1]),
        "sym": "-symmetric" in case,
    }
    return gptq_config.parse(document, "config.json").for_module(case)


def read(case, version):
    tensors = gptq_tensors(case, version)
    return gptq.unpack(tensors, case, "the golden file", SHAPE, settings_of(case, version))


def test_the_golden_weights_are_of_every_kind():
    assert len(GPTQ_CASES) == 20
    scattered = [case for case in GPTQ_CASES if read(case, 1).perm is not None]
    # With one group for all inputs there is nothing to scatter.
    assert scattered == [c for c in GPTQ_CASES if "act-order" in c and "group-1" not in c]
    asymmetric = [case for case in GPTQ_CASES if "asymmetric" in case]
    assert all(int(read(case, 1).zeros.min()) == 0 for case in asymmetric)  # stored by borrowing
    assert all(read(case, 1).zeros is None for case in GPTQ_CASES if case not in asymmetric)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq_weights_have_the_values_that_gptqmodel_gives_them(case, version):
    """To the bit: one product in float16 there, one in float32 rounded to float16 here."""
    expected = STORED[f"{case}.expected"]
    ours = read(case, version)
    assert bits_of(case) == ours.bits
    assert ours.dtype == expected.dtype == torch.float16
    assert torch.equal(ours.dequantize(), expected)


@pytest.mark.parametrize("case", [case for case in GPTQ_CASES if "-symmetric" in case])
def test_a_weight_written_again_is_the_file_that_gptqmodel_wrote(case):
    written = gptq.pack(read(case, 1), case)
    theirs = gptq_tensors(case, 1)
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", sorted({name.partition(".")[0] for name in OLDER}))
def test_gptq_weights_have_the_values_that_autogptq_gives_them(case):
    expected = OLDER[f"{case}.expected"]
    ours = gptq.unpack(OLDER, case, "the golden file", tuple(expected.shape), settings_of(case, 1))
    assert (ours.perm is None) == ("in-order" in case)
    assert (ours.zeros is None) == ("-symmetric" in case)
    assert torch.equal(ours.dequantize(), expected)
    written = gptq.pack(ours, case)
    assert len(written) == 4
    assert all(torch.equal(written[name], OLDER[name]) for name in written)


@pytest.mark.parametrize("group", [32, 128])
def test_awq_weights_have_the_values_that_gptqmodel_gives_them(group):
    case = f"awq-group{group}"
    tensors = {name: value for name, value in STORED.items() if name.startswith(f"{case}.")}
    expected = tensors.pop(f"{case}.expected")
    ours = awq.unpack(tensors, case, "the golden file", SHAPE)
    assert ours.group_inputs == group
    assert int(ours.zeros.min()) == 0
    assert torch.equal(ours.dequantize(), expected)


def packed_weights():
    """Every packed weight: its tensor, gptqmodel's name of its module, and our Weight."""
    checkpoint = open_checkpoint(DIRECTORY)
    for tensor in checkpoint.tensors:
        if packed := checkpoint.packing(tensor):
            theirs = checkpoint.stored_names[packed.names[0]].rpartition(".")[0]
            yield tensor, theirs, checkpoint.weight(tensor)


def test_a_directory_has_the_weights_that_gptqmodel_loads():
    weights = list(packed_weights())
    expected = {name.removeprefix("mixtral."): value for name, value in STORED.items()}
    assert len(weights) == 4 + 3 * 4
    for tensor, theirs, weight in weights:
        assert (weight.perm is not None) == (tensor.shape[1] > 32), tensor.name  # several groups
        assert torch.equal(weight.dequantize(), expected[theirs]), tensor.name


@torch.no_grad()
def test_a_directory_has_the_logits_that_gptqmodel_computes():
    """From its weights rounded to float16, as gptqmodel computes, and from the packed ones."""
    model = MixtralForCausalLM.from_pretrained(DIRECTORY, torch_dtype=torch.float32)
    expected = STORED["mixtral.logits"]
    ids = exact.ids(exact.SEQUENCE, model.config.vocab_size, 2)[None]
    assert expected.std() > 0.5
    assert float((model(input_ids=ids).logits[0] - expected).abs().max()) < 5e-3
    checkpoint = open_checkpoint(DIRECTORY)
    rounded = {tensor.name: weight.dequantize().float() for tensor, _, weight in packed_weights()}
    dense = MixtralForCausalLM(model.config)
    dense.load_state_dict(
        {
            tensor.name: rounded[tensor.name]
            if tensor.name in rounded
            else checkpoint.read(tensor.name).float()
            for tensor in checkpoint.tensors
        }
    )
    assert float((dense.eval()(input_ids=ids).logits[0] - expected).abs().max()) < 1e-5
