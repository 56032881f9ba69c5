"""Dense tensors that hold NaN or infinity are refused while they are loaded, by file and name."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.offload import Tiers
from tests.support.models import load_in_tiers, small_model

EXPERT = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
TENSORS = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.2.self_attn.v_proj.weight",
    "model.layers.1.block_sparse_moe.gate.weight",
    EXPERT,
]
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def changed(folder, name, change, dtype=torch.bfloat16):
    """A small checkpoint with one tensor changed; the changed file."""
    small_model().to(dtype).save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def last_value(value):
    def change(tensor):
        tensor.view(-1)[-1] = value

    return change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.diagonal
def test_a_value_that_is_not_finite_is_refused_by_file_and_tensor(tmp_path, name, bad, dtype):
    file = changed(tmp_path, name, last_value(BAD[bad]), dtype)
    wanted = (
        rf"{re.escape(str(file))}: tensor {re.escape(name)} holds NaN or infinity.*1 of \d+ are"
    )
    for options in ({}, {"dtype": "float32"}, {"dtype": "float16"}):
        with pytest.raises(CheckpointError, match=wanted):
            MixtralForCausalLM.from_pretrained(tmp_path, device="cpu", **options)


def test_an_expert_that_stays_in_the_file_is_refused_when_it_is_read(tmp_path):
    changed(tmp_path, EXPERT, last_value(float("nan")))
    tiers = Tiers(device=0, host=8)
    model = load_in_tiers(tmp_path, "cpu", tiers=tiers)
    with pytest.raises(CheckpointError, match=f"tensor {re.escape(EXPERT)} holds NaN or infinity"):
        model(torch.arange(64)[None])


def test_large_values_whose_sum_overflows_are_no_error(tmp_path):
    largest = torch.finfo(torch.bfloat16).max
    changed(tmp_path, "lm_head.weight", lambda tensor: tensor[3:5].fill_(largest))
    model = MixtralForCausalLM.from_pretrained(tmp_path, device="cpu")
    assert bool((model.lm_head.weight[3:5] == largest).all())
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight: not finite in float16"):
        MixtralForCausalLM.from_pretrained(tmp_path, device="cpu", dtype="float16")


def test_a_float32_value_beyond_bfloat16_is_refused(tmp_path):
    largest = torch.finfo(torch.float32).max
    file = changed(tmp_path, "lm_head.weight", last_value(largest), torch.float32)
    assert (
        MixtralForCausalLM.from_pretrained(tmp_path, device="cpu").lm_head.weight[-1, -1] == largest
    )
    wanted = (
        rf"{re.escape(str(file))}: tensor lm_head.weight: not finite in bfloat16.*"
        r"Load it as float32\."
    )
    with pytest.raises(CheckpointError, match=wanted):
        MixtralForCausalLM.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
