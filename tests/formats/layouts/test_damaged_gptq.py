"""A damaged GPTQ checkpoint: exit 3 and one line that names file, tensor, expected and found."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError
from qmix.models.causal_lm import MixtralForCausalLM
from tests.support import packers
from tests.support.process import qmix

P = "model.layers.1.block_sparse_moe.experts.3.w2"
CONFIG = {"bits": 4, "group_size": 32, "sym": True, "quant_method": "gptq"}
EXPERT = "model.layers.1.block_sparse_moe.experts.3."


def without_an_expert(tensors):
    for name in [name for name in tensors if name.startswith(EXPERT)]:
        del tensors[name]


def with_a_stray_tensor(tensors):
    tensors[f"{P}.stray"] = torch.zeros(1)


def with_nan(tensors):
    tensors[f"{P}.scales"].view(-1)[5] = torch.nan


def out_of_range(tensors):
    tensors[f"{P}.g_idx"][7] = 4


# What is done to it, and a pattern of: the tensor, what was expected, what was found.
DAMAGE = {
    "one expert missing": (
        without_an_expert,
        rf"3 missing, 0 left over; expected each tensor .* once; found missing {re.escape(EXPERT)}w1",
    ),
    "a stray tensor": (
        with_a_stray_tensor,
        rf"model\.safetensors: .*0 missing, 1 left over; expected each .* found left over {P}\.stray",
    ),
    "a NaN scale": (
        with_nan,
        rf"{P}\.scales: holds NaN or infinity; expected finite .*; found 1 other",
    ),
    "g_idx out of range": (
        out_of_range,
        rf"{P}\.g_idx: group index out of range; expected 0 to 3; found 4",
    ),
}


@pytest.fixture(params=DAMAGE)
def damaged(request, tmp_path):
    """(directory, pattern)."""
    damage, pattern = DAMAGE[request.param]
    folder = tmp_path / "checkpoint"
    packers.checkpoint(folder, packers.gptq, CONFIG)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder, pattern


def test_it_is_not_loaded(damaged):
    folder, pattern = damaged
    with pytest.raises(CheckpointError) as caught:
        MixtralForCausalLM.from_pretrained(folder, device="cpu")
    assert caught.value.exit_code == 3
    assert str(folder) in str(caught.value)
    assert re.search(pattern, str(caught.value)), str(caught.value)


def test_verify_says_so_in_one_line(damaged):
    folder, pattern = damaged
    found = qmix("verify", folder)
    assert found.returncode == 3, found.stderr
    assert found.stdout == ""
    (line,) = found.stderr.strip().splitlines()
    assert line.startswith(f"qmix: {folder}")
    assert re.search(pattern, line), line
