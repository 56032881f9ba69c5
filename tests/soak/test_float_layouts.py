"""Damaged folders of FP4 and FP8 Mixtrals: refused by name at once, or what their bytes say.

One file of a golden folder is damaged, and every weight read. What is read must be equal to what
the safetensors library and a few lines of arithmetic here make of the same file.
"""

import shutil
from collections import Counter

import pytest
import torch

from qmix.errors import QmixError
from qmix.formats import open_checkpoint
from tests.support import damaged_folders
from tests.support.golden import COMPRESSED, MODELOPT, TRANSFORMERS_FP8, golden_folder
from tests.support.mutation import generator
from tests.support.promptness import within
from tests.support.soak import SEED, gate_and_soak, tries

LAYOUTS = [
    (MODELOPT, "nvfp4"),
    (COMPRESSED, "nvfp4"),
    (COMPRESSED, "mxfp4"),
    (COMPRESSED, "int4-kv"),
    (COMPRESSED, "fp8-channel"),
    (COMPRESSED, "mixed"),
    (TRANSFORMERS_FP8, "block"),
]
TRIES = {False: 200, True: 1000}
SECONDS = 1.0  # of this process
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def meant(module, tensors):
    """The weight of a module in float32; None if it is dense."""
    of = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()
          if name.rpartition(".")[0] == module}  # fmt: skip
    if "weight_shape" in of:
        words = of["weight_packed"][..., None] >> torch.arange(0, 32, 4) & 15
        return blocks(words.flatten(1).float() - 8, of["weight_scale"].float())
    scale = of.get("weight_scale", of.get("weight_scale_inv"))
    if scale is None:
        return None
    codes = of.get("weight_packed", of.get("weight"))
    if codes.dtype != torch.uint8:
        return blocks(codes.float(), scale.float())
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    else:
        scale = scale.float()
    if "weight_scale_2" in of:
        scale = scale * of["weight_scale_2"]
    if "weight_global_scale" in of:
        scale = scale / of["weight_global_scale"]
    values = torch.stack((E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]), -1).flatten(1)
    return blocks(values, scale)


def blocks(values, scale):
    """Values times the scale of their block; a list of scales has one for each output."""
    if scale.dim() < 2:
        return values * scale.reshape(-1, 1)
    rows, columns = (a // b for a, b in zip(values.shape, scale.shape, strict=True))
    return values * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def attempt(folder):
    """ "refused", or "read" if every weight is what the file's bytes say."""
    try:
        with within(SECONDS):
            checkpoint = open_checkpoint(folder)
            weights = {
                tensor.prefix: checkpoint.weight(tensor).dequantize(torch.float32)
                for tensor in checkpoint.tensors
                if tensor.linear
            }
    except QmixError as error:
        line = str(error)
        assert line.isprintable(), ascii(line)
        return "refused"
    stored = damaged_folders.tensors(folder)
    names = checkpoint.stored_names
    tensors = {canonical: stored[name] for canonical, name in names.items()}
    for module, weight in weights.items():
        expected = meant(module, tensors)
        if expected is not None:
            assert torch.equal(weight, expected), module
    return "read"


@pytest.mark.parametrize(
    ("maker", "name", "soak"), gate_and_soak([(*case,) for case in LAYOUTS], LAYOUTS)
)
def test_a_damaged_folder_is_refused_or_is_what_its_bytes_say(tmp_path, counted, maker, name, soak):
    counts = Counter({"refused": 0, "read": 0})
    wrong = []
    for number in tries(TRIES[soak]):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(golden_folder(maker, name), folder)
        rng = generator(SEED, maker, name, soak, number)
        damaged, way = damaged_folders.damage(folder, rng)
        try:
            counts[attempt(folder)] += 1
        except Exception as error:  # noqa: BLE001 - the oracle: nothing else may come out
            wrong.append((number, damaged, way, repr(error)[:300]))
    counted(cases=number + 1, **counts)
    assert wrong == []
    assert counts["refused"] > (number + 1) // 4
